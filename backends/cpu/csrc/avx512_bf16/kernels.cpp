// AVX512_BF16 on top of AVX512_VNNI: products of bfloat16 by pairs.
#include "kernel_table.h"

namespace graphwright::avx512_bf16 {

extern const FloatLinearKernels float_linear;

const KernelTable kernels = {.float_linear = &float_linear};

}  // namespace graphwright::avx512_bf16
