// AVX2 + FMA + F16C: 256-bit vectors. Bytes are widened to 16 bits first, because maddubs saturates.
#include <immintrin.h>

#include "kernel_table.h"

namespace graphwright::avx2 {
namespace {

std::int32_t sum_lanes(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(1, 0, 3, 2)));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(2, 3, 0, 1)));
  return _mm_cvtsi128_si32(s);
}

std::int32_t dot_u8s8(const std::uint8_t* a, const std::int8_t* b, std::size_t n) {
  __m256i sum = _mm256_setzero_si256();
  std::size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a + i)));
    const __m256i y = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + i)));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, y));
  }
  std::int32_t total = sum_lanes(sum);
  for (; i < n; ++i) total += std::int32_t{a[i]} * std::int32_t{b[i]};
  return total;
}

}  // namespace

extern const ByteLinear byte_linear;
extern const ByteRowsKernels byte_rows;
extern const FloatLinearKernels float_linear;
extern const KronKernels kron_linear;
extern const RowKernels row_kernels;
extern const AttentionKernels attention;
extern const SparseByteKernels sparse_bytes;
extern const SparseFloatKernels sparse_floats_kernels;

const KernelTable kernels = {.dot_u8s8 = dot_u8s8,
                             .byte_linear = &byte_linear,
                             .byte_rows = &byte_rows,
                             .float_linear = &float_linear,
                             .kron_linear = &kron_linear,
                             .attention = &attention,
                             .rows = &row_kernels,
                             .sparse_bytes = &sparse_bytes,
                             .sparse_floats = &sparse_floats_kernels};

}  // namespace graphwright::avx2
