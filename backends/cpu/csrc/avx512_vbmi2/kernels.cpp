// AVX512_VBMI2 on top of AVX512_VNNI: bytes are spread by a mask, or picked by their places, in one instruction.
#include "kernel_table.h"

namespace graphwright::avx512_vbmi2 {

extern const SparseByteKernels sparse_bytes;

const KernelTable kernels = {.sparse_bytes = &sparse_bytes};

}  // namespace graphwright::avx512_vbmi2
