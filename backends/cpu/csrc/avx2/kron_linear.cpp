// Linears on Kronecker products, in 256-bit vectors.
#include <immintrin.h>

#include "kron_kernels.h"

namespace graphwright::avx2 {
namespace {

#include "floats_256.inc"

struct V : Floats {
  static constexpr int kSums = 8;  // of a tile, in vectors
};

#include "math.inc"
#include "epilogue.inc"
#include "kron_linear.inc"

}  // namespace

extern const KronKernels kron_linear;
const KronKernels kron_linear = {.isa = "avx2", .multiply = multiply, .finish = finish};

}  // namespace graphwright::avx2
