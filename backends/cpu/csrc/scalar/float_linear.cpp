// The products in floats, one at a time: what every other file must compute.
#include "float_linear_kernels.h"

namespace graphwright::scalar {
namespace {

#include "codes_1.inc"

struct V : Codes {
  // A tile of many rows: its rows and vectors of outputs. With few rows a tile has as many vectors as make kStreamed sums,
  // and kMostVectors at most.
  static constexpr int kRows = 4, kVectors = 4, kMostVectors = 4, kStreamed = 16;
};

#include "math.inc"
#include "epilogue.inc"
#include "linear_floats.inc"
#include "linear_narrow.inc"
#include "linear_codes.inc"
#include "round_floats.inc"

}  // namespace

extern const FloatLinearKernels float_linear;
const FloatLinearKernels float_linear = {.isa = "scalar",
                                         .pairs = false,
                                         .float32 = dense<Float32>,
                                         .bfloat16 = dense<Bfloat16Apart>,
                                         .coded_float32 = coded<Float32>,
                                         .coded_bfloat16 = nullptr,
                                         .coded_few = coded_few,
                                         .narrow_float32 = narrow<float>,
                                         .narrow_bfloat16 = narrow<std::uint16_t>,
                                         .round_row = round_row<float>};

}  // namespace graphwright::scalar
