// Sparse codes as dense ones: eight at a time, by a table of where each goes.
#include <immintrin.h>

#include "sparse_linear_kernels.h"

namespace graphwright::avx2 {
namespace {

// For each mask of eight bits the places of its values; 128 where there is none, which shuffles in a 0.
struct Places {
  std::uint64_t of[256];

  constexpr Places() : of() {
    for (unsigned mask = 0; mask < 256; ++mask) {
      std::uint64_t count = 0;
      for (unsigned bit = 0; bit < 8; ++bit) {
        of[mask] |= (((mask >> bit) & 1U) != 0 ? count++ : std::uint64_t{128}) << (8 * bit);
      }
    }
  }
};
constexpr Places kPlaces;

struct S {
  // Eight bytes are read at a time, up to seven beyond the last value.
  static std::size_t spread(const std::uint8_t* values, std::uint64_t mask, const std::uint8_t* fill, std::uint8_t raise,
                            std::uint8_t* to) {
    const __m128i raised = _mm_set1_epi8(static_cast<char>(raise));
    const std::uint8_t* from = values;
    for (unsigned i = 0; i < 64; i += 8) {
      const auto eight = static_cast<unsigned>(mask >> i) & 255U;
      const __m128i places = _mm_cvtsi64_si128(static_cast<long long>(kPlaces.of[eight]));
      const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
      const __m128i moved = _mm_add_epi8(_mm_shuffle_epi8(codes, places), raised);
      const __m128i zeros = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(fill + i));
      // The sign of a place says that there is no value.
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to + i), _mm_blendv_epi8(moved, zeros, places));
      from += __builtin_popcount(eight);
    }
    return static_cast<std::size_t>(from - values);
  }

  template <bool kInt4>
  static std::size_t expand(const std::uint8_t* values, const std::uint64_t* masks, const std::uint8_t* fill,
                            std::uint8_t raise, std::uint8_t* to) {
    if constexpr (!kInt4) {
      const std::size_t first = spread(values, masks[0], fill, raise, to);
      return first + spread(values + first, masks[1], fill + 64, raise, to + 64);
    }
    alignas(32) std::uint8_t low[64 + 8], high[64 + 8];
    const __m256i four = _mm256_set1_epi8(15);
    for (int half = 0; half < 64; half += 32) {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + half));
      _mm256_store_si256(reinterpret_cast<__m256i*>(low + half), _mm256_and_si256(both, four));
      _mm256_store_si256(reinterpret_cast<__m256i*>(high + half), _mm256_and_si256(_mm256_srli_epi16(both, 4), four));
    }
    const std::size_t first = spread(low, masks[0], fill, raise, to);
    const std::size_t second = spread(high, masks[1], fill + 64, raise, to + 64);
    return first > second ? first : second;
  }
};

#include "sparse_bytes.inc"

}  // namespace

extern const SparseByteKernels sparse_bytes;
const SparseByteKernels sparse_bytes = {.isa = "avx2",
                                        .expand = expand,
                                        .few = nullptr,
                                        .few_rows = 0,
                                        .gathered = nullptr,
                                        .blocked = nullptr,
                                        .turn = nullptr,
                                        .lanes = 0,
                                        .blocked_rows = 0};

}  // namespace graphwright::avx2
