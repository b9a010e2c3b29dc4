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
  template <bool kBfloat16>
  static std::size_t expand(const std::uint8_t* values, std::uint64_t mask, float* to) {
    constexpr std::size_t kBytes = kBfloat16 ? 2 : 4;
    std::size_t taken = 0;
    for (unsigned i = 0; i < 64; ++i) {
      std::uint32_t bits = 0;
      if (((mask >> i) & 1U) != 0) {
        __builtin_memcpy(&bits, values + taken, kBytes);
        taken += kBytes;
      }
      to[i] = V::from_bits(kBfloat16 ? bits << 16U : bits);
    }
    return taken;
  }
};

#include "sparse_floats.inc"

}  // namespace

extern const SparseFloatKernels sparse_floats_kernels;
const SparseFloatKernels sparse_floats_kernels = {.isa = "scalar", .run = sparse_floats};

}  // namespace graphwright::scalar
