// NEON, of every 64-bit Arm CPU. No kernel of its own yet: every entry is the scalar one.
#include "kernel_table.h"

namespace graphwright::neon {

const KernelTable kernels = {};

}  // namespace graphwright::neon
