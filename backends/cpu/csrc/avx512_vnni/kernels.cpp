// AVX-512 + AVX512_VNNI: four byte products a lane in one 512-bit instruction.
#include <immintrin.h>

#include "kernel_table.h"

namespace graphwright::avx512_vnni {
namespace {

std::int32_t dot_u8s8(const std::uint8_t* a, const std::int8_t* b, std::size_t n) {
  __m512i sum = _mm512_setzero_si512();
  std::size_t i = 0;
  for (; i + 64 <= n; i += 64) {
    sum = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i));
  }
  const __mmask64 rest = (__mmask64{1} << (n - i)) - 1;
  sum = _mm512_dpbusd_epi32(sum, _mm512_maskz_loadu_epi8(rest, a + i), _mm512_maskz_loadu_epi8(rest, b + i));
  return _mm512_reduce_add_epi32(sum);
}

}  // namespace

extern const ByteLinear byte_linear;

const KernelTable kernels = {.dot_u8s8 = dot_u8s8, .byte_linear = &byte_linear};

}  // namespace graphwright::avx512_vnni
