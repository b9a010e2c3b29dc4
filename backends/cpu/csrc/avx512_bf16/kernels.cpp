// AVX512_BF16 on top of AVX512_VNNI. No kernel of its own yet: every entry is its parent's.
#include "kernel_table.h"

namespace graphwright::avx512_bf16 {

const KernelTable kernels = {};

}  // namespace graphwright::avx512_bf16
