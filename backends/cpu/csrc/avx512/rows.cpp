// Activations to bytes, as this instruction set's vectors.
#include "linear_kernels.h"

namespace graphwright::avx512 {
namespace {

#include "rows.inc"

}  // namespace

extern const ByteRowsKernels byte_rows;
const ByteRowsKernels byte_rows = {.symmetric = symmetric_rows, .shifted = shifted_rows, .fixed = static_rows};

}  // namespace graphwright::avx512
