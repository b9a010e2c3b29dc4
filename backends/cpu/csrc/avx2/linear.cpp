// The integer product in 256-bit vectors.
#include <immintrin.h>

#include "linear_kernels.h"

namespace graphwright::avx2 {
namespace {

#include "vectors_256.inc"

struct V : Vectors {
  // Even and odd bytes apart, widened to 16 bits: maddubs would saturate.
  static Int dot(Int acc, Int w, Int x) {
    const Int bytes = _mm256_set1_epi16(255);
    const Int even = _mm256_madd_epi16(_mm256_and_si256(w, bytes), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    const Int odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
  }
};

#include "math.inc"
#include "epilogue.inc"
#include "linear_bytes.inc"

}  // namespace

extern const ByteLinear byte_linear;
const ByteLinear byte_linear = {.isa = "avx2", .run = linear_bytes};

}  // namespace graphwright::avx2
