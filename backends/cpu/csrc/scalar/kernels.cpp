// Plain C++: runs everywhere, and says what every other file must compute.
#include "kernel_table.h"

namespace graphwright::scalar {
namespace {

std::int32_t dot_u8s8(const std::uint8_t* a, const std::int8_t* b, std::size_t n) {
  std::int32_t sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += std::int32_t{a[i]} * std::int32_t{b[i]};
  return sum;
}

}  // namespace

extern const ByteLinear byte_linear;
extern const ByteRowsKernels byte_rows;
extern const FloatLinearKernels float_linear;
extern const KronKernels kron_linear;
extern const RowKernels row_kernels;
extern const AttentionKernels attention;
extern const SparseByteKernels sparse_bytes;
extern const SparseFloatKernels sparse_floats_kernels;

const KernelTable kernels = {.dot_u8s8 = dot_u8s8,
                             .byte_linear = &byte_linear,
                             .byte_rows = &byte_rows,
                             .float_linear = &float_linear,
                             .kron_linear = &kron_linear,
                             .attention = &attention,
                             .rows = &row_kernels,
                             .sparse_bytes = &sparse_bytes,
                             .sparse_floats = &sparse_floats_kernels};

}  // namespace graphwright::scalar
