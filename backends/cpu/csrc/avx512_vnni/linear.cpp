// The integer product in 512-bit vectors, four byte products a lane in one instruction.
#include <immintrin.h>

#include "linear_kernels.h"

namespace graphwright::avx512_vnni {
namespace {

struct V {
  using Int = __m512i;
  using Float = __m512;
  static constexpr int kLanes = 16, kRows = 6, kVectors = 4, kStream = 4;

  static Int load(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store_bytes(std::uint8_t* p, Int v) { _mm512_storeu_si512(p, v); }
  static Int set1(std::int32_t v) { return _mm512_set1_epi32(v); }
  static Int low4(Int v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  static Int high4(Int v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
  static Int dot(Int acc, Int w, Int x) { return _mm512_dpbusd_epi32(acc, w, x); }
  static Int subtract(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  static Int multiply(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
  static Int widen(const std::uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Float to_float(Int v) { return _mm512_cvtepi32_ps(v); }
  static Float zero_float() { return _mm512_setzero_ps(); }
  static Float set1_float(float v) { return _mm512_set1_ps(v); }
  static Float load_float(const float* p) { return _mm512_loadu_ps(p); }
  static Float load_half(const std::uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static void prefetch(const std::uint8_t* p) {
    for (int line = 0; line < 4; ++line) _mm_prefetch(reinterpret_cast<const char*>(p + 64 * line), _MM_HINT_T0);
  }
};

#include "linear_bytes.inc"

}  // namespace

extern const ByteLinear byte_linear;
const ByteLinear byte_linear = {.isa = "avx512_vnni", .run = linear_bytes};

}  // namespace graphwright::avx512_vnni
