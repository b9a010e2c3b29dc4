// Norms, activations, rotary embeddings and table rows in 256-bit vectors.
#include <immintrin.h>

#include "row_kernels.h"

namespace graphwright::avx2 {
namespace {

#include "floats_256.inc"

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
const RowKernels row_kernels = {.isa = "avx2",
                                .layer_norm = layer_norm,
                                .rms_norm = rms_norm,
                                .pointwise = pointwise,
                                .rotary = rotary,
                                .unpack_row = unpack_row};

}  // namespace graphwright::avx2
