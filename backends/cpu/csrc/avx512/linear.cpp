// The integer product in 512-bit vectors.
#include <immintrin.h>

#include "linear_kernels.h"

namespace graphwright::avx512 {
namespace {

#include "vectors_512.inc"

struct V : Vectors {
  // Even and odd bytes apart, widened to 16 bits: maddubs would saturate.
  static Int dot(Int acc, Int w, Int x) {
    const Int bytes = _mm512_set1_epi16(255);
    const Int even = _mm512_madd_epi16(_mm512_and_si512(w, bytes), _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
    const Int odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(x, 8));
    return _mm512_add_epi32(acc, _mm512_add_epi32(even, odd));
  }
};

#include "math.inc"
#include "epilogue.inc"
#include "linear_bytes.inc"

}  // namespace

extern const ByteLinear byte_linear;
const ByteLinear byte_linear = {.isa = "avx512", .run = linear_bytes};

}  // namespace graphwright::avx512
