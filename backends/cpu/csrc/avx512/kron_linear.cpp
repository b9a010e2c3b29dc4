// Linears on Kronecker products, in 512-bit vectors.
#include <immintrin.h>

#include "kron_kernels.h"

namespace graphwright::avx512 {
namespace {

#include "floats_512.inc"

struct V : Floats {
  static constexpr int kSums = 16;  // of a tile, in vectors
};

#include "math.inc"
#include "epilogue.inc"
#include "kron_linear.inc"

}  // namespace

extern const KronKernels kron_linear;
const KronKernels kron_linear = {.isa = "avx512", .multiply = multiply, .finish = finish};

}  // namespace graphwright::avx512
