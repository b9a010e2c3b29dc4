// Activations to bytes.
#include <immintrin.h>

#include "linear_kernels.h"

namespace graphwright::avx512 {
namespace {

#include "floats_512.inc"

struct V : Floats {};

#include "row_loads.inc"
#include "row_codes.inc"
#include "rows.inc"

}  // namespace

extern const ByteRowsKernels byte_rows;
const ByteRowsKernels byte_rows = {.symmetric = symmetric_rows, .shifted = shifted_rows, .fixed = static_rows};

}  // namespace graphwright::avx512
