// Norms, activations, rotary embeddings and table rows, one float at a time: what every other file must compute.
#include "row_kernels.h"

namespace graphwright::scalar {
namespace {

#include "floats_1.inc"

struct V : Floats {};

#include "math.inc"
#include "row_loads.inc"
#include "norms.inc"
#include "pointwise.inc"
#include "rotary_pairs.inc"
#include "rotary.inc"
#include "embedding.inc"

}  // namespace

extern const RowKernels row_kernels;
const RowKernels row_kernels = {.isa = "scalar",
                                .layer_norm = layer_norm,
                                .rms_norm = rms_norm,
                                .pointwise = pointwise,
                                .rotary = rotary,
                                .unpack_row = unpack_row};

}  // namespace graphwright::scalar
