// Linears on Kronecker products, one float at a time: what every other file must compute.
#include "kron_kernels.h"

namespace graphwright::scalar {
namespace {

#include "floats_1.inc"

struct V : Floats {
  static constexpr int kSums = 8;  // of a tile, in vectors
};

#include "math.inc"
#include "epilogue.inc"
#include "kron_linear.inc"

}  // namespace

extern const KronKernels kron_linear;
const KronKernels kron_linear = {.isa = "scalar", .multiply = multiply, .finish = finish};

}  // namespace graphwright::scalar
