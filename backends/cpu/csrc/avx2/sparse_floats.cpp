// Products with sparse floats, in 256-bit vectors.
#include <immintrin.h>

#include "sparse_linear_kernels.h"

namespace graphwright::avx2 {
namespace {

#include "codes_256.inc"

struct V : Codes {
  static constexpr int kRows = 6, kVectors = 2, kMostVectors = 8, kStreamed = 8;  // see float_linear.cpp
};

#include "math.inc"
#include "epilogue.inc"
#include "linear_floats.inc"

// For each mask of eight lanes the place of each one's value, in four bits; 8 and more where there is none.
struct Places {
  std::uint32_t of[256];

  constexpr Places() : of() {
    for (unsigned mask = 0; mask < 256; ++mask) {
      unsigned count = 0;
      for (unsigned lane = 0; lane < 8; ++lane) of[mask] |= (((mask >> lane) & 1U) != 0 ? count++ : 8U) << (4 * lane);
    }
  }
};
constexpr Places kPlaces;

struct S {
  static constexpr int kFewRows = 1;

  template <bool kBfloat16>
  static V::Float vector(const std::uint8_t* values, unsigned mask) {
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28), seven = _mm256_set1_epi32(7);
    const __m256i packed = _mm256_set1_epi32(static_cast<int>(kPlaces.of[mask]));
    const __m256i places = _mm256_and_si256(_mm256_srlv_epi32(packed, shifts), _mm256_set1_epi32(15));
    const V::Float found = kBfloat16 ? V::load_bf16(reinterpret_cast<const std::uint16_t*>(values))
                                     : V::load_float(reinterpret_cast<const float*>(values));
    const __m256 spread = _mm256_permutevar8x32_ps(found, places);
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(places, seven)), spread);
  }
};

#include "sparse_floats.inc"
#include "sparse_skip.inc"

}  // namespace

extern const SparseFloatKernels sparse_floats_kernels;
const SparseFloatKernels sparse_floats_kernels = {.isa = "avx2",
                                                  .run = sparse_floats,
                                                  .skip = skip,
                                                  .turn = turn_rows,
                                                  .lanes = V::kLanes,
                                                  .most_rows = V::kLanes * kSkipVectors};

}  // namespace graphwright::avx2
