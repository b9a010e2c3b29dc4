// The integer product in 256-bit vectors, four byte products a lane in one instruction.
#include <immintrin.h>

#include "linear_kernels.h"

namespace graphwright::avx_vnni {
namespace {

#include "vectors_256.inc"

struct V : Vectors {
  // GCC 12 copies the sums around the intrinsic, twice for each product.
  static Int dot(Int acc, Int w, Int x) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(x));
    return acc;
  }
};

#include "math.inc"
#include "epilogue.inc"
#include "linear_bytes.inc"

}  // namespace

extern const ByteLinear byte_linear;
const ByteLinear byte_linear = {.isa = "avx_vnni", .run = linear_bytes};

}  // namespace graphwright::avx_vnni
