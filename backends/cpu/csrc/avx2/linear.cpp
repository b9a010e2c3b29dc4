// The integer product in 256-bit vectors.
#include <immintrin.h>

#include "linear_kernels.h"

namespace graphwright::avx2 {
namespace {

struct V {
  using Int = __m256i;
  using Float = __m256;
  static constexpr int kLanes = 8, kRows = 4, kVectors = 2, kStream = 4;

  static Int load(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_bytes(std::uint8_t* p, Int v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static Int set1(std::int32_t v) { return _mm256_set1_epi32(v); }
  static Int low4(Int v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
  static Int high4(Int v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15)); }
  // Even and odd bytes apart, widened to 16 bits: maddubs would saturate.
  static Int dot(Int acc, Int w, Int x) {
    const Int bytes = _mm256_set1_epi16(255);
    const Int even = _mm256_madd_epi16(_mm256_and_si256(w, bytes), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    const Int odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
  }
  static Int subtract(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  static Int multiply(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
  static Int widen(const std::uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static Float to_float(Int v) { return _mm256_cvtepi32_ps(v); }
  static Float zero_float() { return _mm256_setzero_ps(); }
  static Float set1_float(float v) { return _mm256_set1_ps(v); }
  static Float load_float(const float* p) { return _mm256_loadu_ps(p); }
  static Float load_half(const std::uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static void prefetch(const std::uint8_t* p) {
    for (int line = 0; line < 4; ++line) _mm_prefetch(reinterpret_cast<const char*>(p + 64 * line), _MM_HINT_T0);
  }
};

#include "linear_bytes.inc"

}  // namespace

extern const ByteLinear byte_linear;
const ByteLinear byte_linear = {.isa = "avx2", .run = linear_bytes};

}  // namespace graphwright::avx2
