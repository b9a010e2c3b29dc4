// The products in floats, in 256-bit vectors.
#include <immintrin.h>

#include "float_linear_kernels.h"

namespace graphwright::avx2 {
namespace {

#include "codes_256.inc"

struct V : Codes {
  static constexpr int kRows = 6, kVectors = 2, kMostVectors = 8, kStreamed = 8;
};

#include "math.inc"
#include "epilogue.inc"
#include "linear_floats.inc"
#include "linear_narrow.inc"
#include "linear_codes.inc"
#include "round_floats.inc"

}  // namespace

extern const FloatLinearKernels float_linear;
const FloatLinearKernels float_linear = {.isa = "avx2",
                                         .pairs = false,
                                         .float32 = dense<Float32>,
                                         .bfloat16 = dense<Bfloat16Apart>,
                                         .coded_float32 = coded<Float32>,
                                         .coded_bfloat16 = nullptr,
                                         .coded_few = coded_few,
                                         .narrow_float32 = narrow<float>,
                                         .narrow_bfloat16 = narrow<std::uint16_t>,
                                         .round_row = round_row<float>};

}  // namespace graphwright::avx2
