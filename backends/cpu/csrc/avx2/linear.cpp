// The integer product in 256-bit vectors.
#include <immintrin.h>

#include "linear_kernels.h"

namespace graphwright::avx2 {
namespace {

#include "vectors_256.inc"

struct V : Vectors {
  static constexpr bool kPairs = true;
  static constexpr int kFewVectors = 8;
  // Products of unsigned and signed bytes, added up two by two in 16 bits: exact where the unsigned ones are below 128.
  // GCC 12 keeps sums in memory around the intrinsics.
  static Int add_pairs(Int acc, Int w, Int x) {
    Int products;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(acc), "=&x"(products) : "x"(w), "x"(x));
    return acc;
  }
  static Int widen_pairs(Int v) { return _mm256_madd_epi16(v, _mm256_set1_epi16(1)); }

  // Two vectors: one line.
  static void prefetch_own(const std::uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
  static Int even_bytes(Int v) { return _mm256_and_si256(v, _mm256_set1_epi16(255)); }
  static Int odd_bytes(Int v) { return _mm256_srli_epi16(v, 8); }
  static Int add_wide(Int acc, Int w, Int x) {
    Int products;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(products) : "x"(w), "x"(x));
    return acc;
  }
  // `count` codes, a multiple of 4, in memory of this thread.
  static const std::int8_t* widen_rows(const std::int8_t* codes, std::size_t count) {
    std::int16_t* to = memory_of_wide_rows(count);
    const Int order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,  //
                                       0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    std::size_t i = 0;
    for (; i + 16 <= count; i += 16) {
      const Int wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
      _mm256_storeu_si256(reinterpret_cast<Int*>(to + i), _mm256_shuffle_epi8(wide, order));
    }
    for (; i < count; i += 4) {
      for (std::size_t n = 0; n < 4; ++n) to[i + n] = codes[i + n / 2 + n % 2 * 2];
    }
    return reinterpret_cast<const std::int8_t*>(to);
  }
};

#include "math.inc"
#include "epilogue.inc"
#include "linear_bytes.inc"

}  // namespace

extern const ByteLinear byte_linear;
const ByteLinear byte_linear = {.isa = "avx2", .run = linear_bytes};

}  // namespace graphwright::avx2
