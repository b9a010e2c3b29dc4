// AVX512_BF16 on top of AVX512_VNNI. No kernel of its own yet: every entry is its parent's.
#include "kernel_table.h"

namespace graphwright::avx512_bf16 {

const KernelTable kernels = {.dot_u8s8 = nullptr, .byte_linear = nullptr, .byte_rows = nullptr};

}  // namespace graphwright::avx512_bf16
