// Products with sparse floats, in 512-bit vectors.
#include <immintrin.h>

#include "sparse_linear_kernels.h"

namespace graphwright::avx512 {
namespace {

#include "codes_512.inc"

struct V : Codes {
  static constexpr int kRows = 6, kVectors = 4, kMostVectors = 4, kStreamed = 16;  // see float_linear.cpp
};

#include "math.inc"
#include "epilogue.inc"
#include "linear_floats.inc"

struct S {
  static constexpr int kFewRows = 4;

  // Into a vector of zeros, which GCC would make the form that clears by itself: on Zen 4 that waits for its target's old
  // value, and takes three times as long.
  template <bool kBfloat16>
  static V::Float vector(const std::uint8_t* values, unsigned mask) {
    const V::Float found = kBfloat16 ? V::load_bf16(reinterpret_cast<const std::uint16_t*>(values))
                                     : V::load_float(reinterpret_cast<const float*>(values));
    V::Float lanes = V::zero_float();
    __asm__("vexpandps %2, %0%{%1%}" : "+v"(lanes) : "Yk"(static_cast<__mmask16>(mask)), "v"(found));
    return lanes;
  }
};

#include "sparse_floats.inc"
#include "sparse_skip.inc"

}  // namespace

extern const SparseFloatKernels sparse_floats_kernels;
const SparseFloatKernels sparse_floats_kernels = {.isa = "avx512",
                                                  .run = sparse_floats,
                                                  .skip = skip,
                                                  .turn = turn_rows,
                                                  .lanes = V::kLanes,
                                                  .most_rows = V::kLanes * kSkipVectors};

}  // namespace graphwright::avx512
