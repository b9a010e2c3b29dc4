#include "sparse_skip.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "threads.h"

namespace graphwright {
namespace {

template <bool kBfloat16>
float weight_at(const std::uint8_t* values) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, values, kBfloat16 ? 2 : 4);
  return std::bit_cast<float>(kBfloat16 ? bits << 16U : bits);
}

// Of each output a mask of columns, and its weights.
struct Outputs {
  std::array<std::uint64_t, kPanel> masks;
  std::array<std::uint32_t, kPanel> counts;
  float weights[kPanel][kSkipColumns];
};

// From the masks of columns, which have a bit for each output, and their values; gives where the next values are.
template <bool kBfloat16>
const std::uint8_t* turn(const std::uint64_t* columns, std::size_t count, const std::uint8_t* values, Outputs& to) {
  to.masks.fill(0);
  to.counts.fill(0);
  for (std::size_t column = 0; column < count; ++column) {
    for (std::uint64_t left = columns[column]; left != 0; left &= left - 1) {
      const auto n = static_cast<std::size_t>(std::countr_zero(left));
      to.masks[n] |= std::uint64_t{1} << column;
      to.weights[n][to.counts[n]++] = weight_at<kBfloat16>(values);
      values += kBfloat16 ? 2 : 4;
    }
  }
  return values;
}

// Outputs by how many weights they have.
void order(const Outputs& found, std::uint8_t* outputs) {
  std::array<std::uint8_t, kSkipColumns + 2> places{};
  for (const std::uint32_t count : found.counts) ++places[count + 1];
  for (std::size_t count = 1; count < places.size(); ++count) places[count] += places[count - 1];
  for (std::size_t n = 0; n < kPanel; ++n) outputs[places[found.counts[n]]++] = static_cast<std::uint8_t>(n);
}

}  // namespace

void sort_panel(const SparseWeights& sparse, std::size_t panel, SkipWeights& to) {
  const bool bfloat16 = sparse.kind == SparseValues::kBfloat16;
  const std::size_t chunks = (sparse.steps + kSkipColumns - 1) / kSkipColumns, bytes = bfloat16 ? 2 : 4;
  const std::uint64_t *masks = sparse.masks + panel * sparse.steps, *offsets = sparse.offsets + panel * sparse.blocks();
  const std::uint8_t* values = sparse.values + offsets[0];
  to.chunks.resize(chunks);
  to.weights.resize((offsets[sparse.blocks()] - offsets[0]) / bytes);
  static_assert(kSkipColumns <= 64 && kPanel * kSkipColumns <= 65536);
  Outputs found;
  std::uint32_t begin = 0;
  for (std::size_t i = 0; i < chunks; ++i) {
    const std::size_t column = i * kSkipColumns;
    const std::size_t here = std::min(kSkipColumns, sparse.steps - column);
    values = (bfloat16 ? turn<true> : turn<false>)(masks + column, here, values, found);
    SkipChunk& chunk = to.chunks[i];
    order(found, chunk.outputs);
    chunk.begin = begin;
    std::uint32_t start = 0;
    for (std::size_t place = 0; place < kPanel; ++place) {
      const std::size_t n = chunk.outputs[place];
      chunk.masks[place] = found.masks[n];
      chunk.starts[place] = static_cast<std::uint16_t>(start);
      std::copy_n(found.weights[n], found.counts[n], to.weights.data() + begin + start);
      start += found.counts[n];
    }
    begin += start;
  }
}

std::vector<SkipWeights> sort_panels(const SparseWeights& sparse, std::size_t threads) {
  std::vector<SkipWeights> panels(sparse.panels);
  parallel_for(sparse.panels, threads, [&](std::size_t panel) { sort_panel(sparse, panel, panels[panel]); });
  return panels;
}

}  // namespace graphwright
