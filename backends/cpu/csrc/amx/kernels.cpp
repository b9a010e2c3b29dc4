// AMX tiles (TILE, INT8, BF16) on top of AVX512_BF16. No kernel of its own yet: every entry is its parent's.
#include "kernel_table.h"

namespace graphwright::amx {

const KernelTable kernels = {};

}  // namespace graphwright::amx
