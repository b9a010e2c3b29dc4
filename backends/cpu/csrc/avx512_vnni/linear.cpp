// The integer product in 512-bit vectors, four byte products a lane in one instruction.
#include <immintrin.h>

#include "linear_kernels.h"

namespace graphwright::avx512_vnni {
namespace {

#include "vectors_512.inc"

struct V : Vectors {
  // GCC 12 copies the sums around the intrinsic, twice for each product.
  static Int dot(Int acc, Int w, Int x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
  }
};

#include "math.inc"
#include "epilogue.inc"
#include "linear_bytes.inc"

}  // namespace

extern const ByteLinear byte_linear;
const ByteLinear byte_linear = {.isa = "avx512_vnni", .run = linear_bytes};

}  // namespace graphwright::avx512_vnni
