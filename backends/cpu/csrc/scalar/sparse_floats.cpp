// Products with sparse floats, one at a time: what every other file must compute.
#include "sparse_linear_kernels.h"

namespace graphwright::scalar {
namespace {

#include "codes_1.inc"

struct V : Codes {
  static constexpr int kRows = 4, kVectors = 4, kMostVectors = 4, kStreamed = 16;  // see float_linear.cpp
};

#include "math.inc"
#include "epilogue.inc"
#include "linear_floats.inc"

struct S {
  static constexpr int kFewRows = 0;

  template <bool kBfloat16>
  static V::Float vector(const std::uint8_t* values, unsigned mask) {
    std::uint32_t bits = 0;
    if (mask != 0) __builtin_memcpy(&bits, values, kBfloat16 ? 2 : 4);
    return V::from_bits(kBfloat16 ? bits << 16U : bits);
  }
};

#include "sparse_floats.inc"
#include "sparse_skip.inc"

}  // namespace

extern const SparseFloatKernels sparse_floats_kernels;
const SparseFloatKernels sparse_floats_kernels = {.isa = "scalar",
                                                  .run = sparse_floats,
                                                  .skip = skip,
                                                  .turn = turn_rows,
                                                  .lanes = V::kLanes,
                                                  .most_rows = V::kLanes * kSkipVectors};

}  // namespace graphwright::scalar
