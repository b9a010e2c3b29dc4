// Sparse floats for many rows: the weights of each output one after another, so that zeros are skipped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "sparse_linear_kernels.h"

namespace graphwright {

// What a SkipPanel points to.
struct SkipWeights {
  std::vector<SkipChunk> chunks;
  std::vector<float> weights;

  SkipPanel view() const { return {chunks.data(), weights.data()}; }
};

// One panel's; what `to` held is lost.
void sort_panel(const SparseWeights& sparse, std::size_t panel, SkipWeights& to);

// Those of all panels.
std::vector<SkipWeights> sort_panels(const SparseWeights& sparse, std::size_t threads);

}  // namespace graphwright
