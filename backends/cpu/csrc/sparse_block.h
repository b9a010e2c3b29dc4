// Sparse codes in blocks of four columns for many rows: the blocks of each output one after another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernel_table.h"
#include "sparse_linear_kernels.h"

namespace graphwright {

// What a BlockedPanel points to.
struct BlockedCodes {
  std::vector<BlockedChunk> chunks;
  std::vector<std::int32_t> codes;
  std::vector<std::uint8_t> places;

  BlockedPanel view() const { return {chunks.data(), codes.data(), places.data()}; }
};

// Those of all panels, from weights with one group and no zero points.
std::vector<BlockedCodes> sort_blocks(const KernelTable& kernels, const SparseWeights& sparse, const PackedLinear& weights,
                                      std::size_t threads);

// Rows of codes times blocks.
void run_blocked(const KernelTable& kernels, const SparseWeights& sparse, const PackedLinear& weights, const ByteRows& rows,
                 const LinearOutput& y, std::size_t threads);

}  // namespace graphwright
