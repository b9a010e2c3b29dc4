// Sparse codes for many rows, in which every output has its own columns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernel_table.h"
#include "sparse_linear_kernels.h"

namespace graphwright {

// What GatheredWeights points to.
struct Gathered {
  std::vector<GatheredSlot> slots;
  std::vector<std::uint32_t> windows;
  std::vector<std::uint64_t> offsets;

  GatheredWeights view() const { return {slots.data(), windows.data(), offsets.data()}; }
};

// From weights with one group and no zero points.
Gathered gather(const KernelTable& kernels, const SparseWeights& sparse, const PackedLinear& weights, std::size_t threads);

}  // namespace graphwright
