// A linear whose weights are mostly zeros, as Python holds it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "byte_linear.h"
#include "sparse_linear_kernels.h"

namespace graphwright {

// What is stored of a weight (ir/ops/sparse.py), and its place in the layout of sparse_linear_kernels.h.
struct SparseShape {
  std::size_t outputs, columns;
  std::size_t group;  // columns; with floats 0
  SparseValues kind;

  bool coded() const { return kind == SparseValues::kInt8 || kind == SparseValues::kInt4; }
  std::size_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  std::size_t group_steps() const { return (group + 3) / 4; }
  std::size_t steps() const { return coded() ? (columns + group - 1) / group * group_steps() : columns; }
  std::size_t blocks() const { return (steps() + kSparseSteps - 1) / kSparseSteps; }
  std::size_t words() const { return coded() ? 4 : 1; }
};

// Masks [panels][steps][words] and offsets [panels * blocks + 1] from `stored` [outputs][ceil(columns / 8)].
void pack_sparse_masks(const SparseShape& shape, const std::uint8_t* stored, std::uint64_t* masks, std::uint64_t* offsets,
                       std::size_t threads);

// The values, offsets[last] bytes, in that order. `stored` are float32, bfloat16, bytes, or two 4-bit codes to a byte; row n
// begins with value row_offsets[n].
void pack_sparse_values(const SparseShape& shape, const std::uint8_t* stored, const std::int32_t* row_offsets,
                        const std::uint64_t* masks, const std::uint64_t* offsets, std::uint8_t* values,
                        std::size_t threads);

// The same linear with one panel, whose codes have been expanded.
PackedLinear panel_of(const PackedLinear& weights, std::size_t panel, const std::uint8_t* codes);
LinearOutput panel_of(const LinearOutput& y, std::size_t panel);

// Memory of this thread for the codes of a panel, and the codes in it. `raise` is added to each.
const std::uint8_t* expanded(const KernelTable& kernels, const SparseWeights& sparse, const PackedLinear& weights,
                             std::size_t panel, std::uint8_t raise);

}  // namespace graphwright
