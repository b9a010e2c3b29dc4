// The products in floats, in 512-bit vectors; bfloat16 by pairs.
#include <immintrin.h>

#include "float_linear_kernels.h"

namespace graphwright::avx512_bf16 {
namespace {

#include "codes_512.inc"

struct V : Codes {
  static constexpr int kRows = 6, kVectors = 4, kMostVectors = 4, kStreamed = 16;
};

#include "math.inc"
#include "epilogue.inc"
#include "linear_floats.inc"

// Two columns in one instruction. It takes subnormals for 0.
struct Bfloat16 {
  using Row = std::uint16_t;
  using Weights = __m512i;
  static constexpr std::size_t kColumns = 2, kRowValues = 2;
  static constexpr int kParts = 1;

  template <int kPart>
  static Weights weights(const std::uint8_t* p) {
    return _mm512_loadu_si512(p);
  }
  template <int kPart>
  static __m512i row(const Row* x) {
    std::int32_t pair;
    __builtin_memcpy(&pair, x, 4);
    return _mm512_set1_epi32(pair);
  }
  static __m512 add(__m512 sum, Weights w, __m512i x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }

  // Rounded to nearest, ties to even.
  static __m512i pair_of(__m512 low, __m512 high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
  static void put(std::uint8_t* to, const __m512* values) { _mm512_storeu_si512(to, pair_of(values[0], values[1])); }
  static void put_column(std::uint8_t* to, bool second, __m512 value) {
    const __m512i first = second ? _mm512_loadu_si512(to) : _mm512_setzero_si512();
    const __m512i own = second ? pair_of(_mm512_setzero_ps(), value) : pair_of(value, _mm512_setzero_ps());
    _mm512_storeu_si512(to, _mm512_or_si512(first, own));
  }
};

#include "linear_narrow.inc"
#include "linear_codes.inc"
#include "round_floats.inc"

}  // namespace

extern const FloatLinearKernels float_linear;
const FloatLinearKernels float_linear = {.isa = "avx512_bf16",
                                         .pairs = true,
                                         .float32 = dense<Float32>,
                                         .bfloat16 = dense<Bfloat16>,
                                         .coded_float32 = coded<Float32>,
                                         .coded_bfloat16 = coded<Bfloat16>,
                                         .coded_few = coded_few,
                                         .narrow_float32 = narrow<float>,
                                         .narrow_bfloat16 = narrow<std::uint16_t>,
                                         .round_row = round_row<std::uint16_t>};

}  // namespace graphwright::avx512_bf16
