// AVX-512 F + BW + CD + DQ + VL: 512-bit vectors; the tail is one masked load, which cannot fault past the end.
#include <immintrin.h>

#include "kernel_table.h"

namespace graphwright::avx512 {
namespace {

__m512i multiply_add(__m512i sum, __m256i a, __m256i b) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_cvtepu8_epi16(a), _mm512_cvtepi8_epi16(b)));
}

std::int32_t dot_u8s8(const std::uint8_t* a, const std::int8_t* b, std::size_t n) {
  __m512i sum = _mm512_setzero_si512();
  std::size_t i = 0;
  for (; i + 32 <= n; i += 32) {
    sum = multiply_add(sum, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i)),
                       _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i)));
  }
  const __mmask32 rest = (__mmask32{1} << (n - i)) - 1;
  sum = multiply_add(sum, _mm256_maskz_loadu_epi8(rest, a + i), _mm256_maskz_loadu_epi8(rest, b + i));
  return _mm512_reduce_add_epi32(sum);
}

}  // namespace

extern const ByteLinear byte_linear;
extern const ByteRowsKernels byte_rows;
extern const FloatLinearKernels float_linear;
extern const KronKernels kron_linear;
extern const RowKernels row_kernels;
extern const AttentionKernels attention;
extern const SparseFloatKernels sparse_floats_kernels;

const KernelTable kernels = {.dot_u8s8 = dot_u8s8,
                             .byte_linear = &byte_linear,
                             .byte_rows = &byte_rows,
                             .float_linear = &float_linear,
                             .kron_linear = &kron_linear,
                             .attention = &attention,
                             .rows = &row_kernels,
                             .sparse_floats = &sparse_floats_kernels};

}  // namespace graphwright::avx512
