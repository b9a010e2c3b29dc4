// Activations to bytes.
#include "linear_kernels.h"

namespace graphwright::scalar {
namespace {

#include "floats_1.inc"

struct V : Floats {};

#include "row_loads.inc"
#include "row_codes.inc"
#include "rows.inc"

}  // namespace

extern const ByteRowsKernels byte_rows;
const ByteRowsKernels byte_rows = {.symmetric = symmetric_rows, .shifted = shifted_rows, .fixed = static_rows};

}  // namespace graphwright::scalar
