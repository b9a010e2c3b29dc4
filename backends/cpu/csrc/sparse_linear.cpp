#include "sparse_linear.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "threads.h"

namespace graphwright {
namespace {

std::size_t count_of(std::uint64_t mask) { return static_cast<std::size_t>(std::popcount(mask)); }

// Words whose values lie together: two of 4-bit codes share bytes.
std::size_t words_together(SparseValues kind) { return kind == SparseValues::kInt4 ? 2 : 1; }

// Bytes of their values.
std::size_t bytes_of(SparseValues kind, const std::uint64_t* masks) {
  switch (kind) {
    case SparseValues::kFloat32: return 4 * count_of(*masks);
    case SparseValues::kBfloat16: return 2 * count_of(*masks);
    case SparseValues::kInt8: return count_of(*masks);
    case SparseValues::kInt4: return std::max(count_of(masks[0]), count_of(masks[1]));
  }
  return 0;
}

// The column of a step's place 0..3, or shape.columns where there is none.
std::size_t column_of(const SparseShape& shape, std::size_t step, std::size_t place) {
  if (!shape.coded()) return step;
  const std::size_t within = step % shape.group_steps() * 4 + place;
  const std::size_t column = step / shape.group_steps() * shape.group + within;
  return within < shape.group && column < shape.columns ? column : shape.columns;
}

}  // namespace

void pack_sparse_masks(const SparseShape& shape, const std::uint8_t* stored, std::uint64_t* masks, std::uint64_t* offsets,
                       std::size_t threads) {
  const std::size_t row_bytes = (shape.columns + 7) / 8, steps = shape.steps(), words = shape.words();
  const std::size_t each = shape.coded() ? 4 : 1;  // places of an output in a step
  const std::size_t together = words_together(shape.kind);
  parallel_for(shape.panels(), threads, [&](std::size_t panel) {
    std::uint64_t* own = masks + panel * steps * words;
    std::fill_n(own, steps * words, std::uint64_t{0});
    const std::size_t here = std::min(kPanel, shape.outputs - panel * kPanel);
    for (std::size_t n = 0; n < here; ++n) {
      const std::uint8_t* row = stored + (panel * kPanel + n) * row_bytes;
      for (std::size_t step = 0; step < steps; ++step) {
        for (std::size_t place = 0; place < each; ++place) {
          const std::size_t column = column_of(shape, step, place), bit = n * each + place;
          if (column >= shape.columns || ((row[column / 8] >> (column % 8)) & 1U) == 0) continue;
          own[step * words + bit / 64] |= std::uint64_t{1} << (bit % 64);
        }
      }
    }
    for (std::size_t block = 0; block < shape.blocks(); ++block) {
      const std::size_t begin = block * kSparseSteps, end = std::min(begin + kSparseSteps, steps);
      std::uint64_t bytes = 0;
      for (std::size_t word = begin * words; word < end * words; word += together) {
        bytes += bytes_of(shape.kind, own + word);
      }
      offsets[panel * shape.blocks() + block + 1] = bytes;
    }
  });
  offsets[0] = 0;
  for (std::size_t block = 0; block < shape.panels() * shape.blocks(); ++block) offsets[block + 1] += offsets[block];
}

void pack_sparse_values(const SparseShape& shape, const std::uint8_t* stored, const std::int32_t* row_offsets,
                        const std::uint64_t* masks, const std::uint64_t* offsets, std::uint8_t* values,
                        std::size_t threads) {
  const std::size_t each = shape.coded() ? 4 : 1;
  parallel_for(shape.panels(), threads, [&](std::size_t panel) {
    std::size_t next[kPanel] = {};
    for (std::size_t n = 0; n < std::min(kPanel, shape.outputs - panel * kPanel); ++n) {
      next[n] = static_cast<std::size_t>(row_offsets[panel * kPanel + n]);
    }
    const std::uint64_t* own = masks + panel * shape.steps() * shape.words();
    std::uint8_t* to = values + offsets[panel * shape.blocks()];
    for (std::size_t word = 0; word < shape.steps() * shape.words(); word += words_together(shape.kind)) {
      const std::size_t bytes = bytes_of(shape.kind, own + word);
      if (shape.kind == SparseValues::kInt4) std::fill_n(to, bytes, std::uint8_t{0});
      for (std::size_t part = 0; part < words_together(shape.kind); ++part) {
        std::size_t count = 0;
        for (std::uint64_t left = own[word + part]; left != 0; left &= left - 1, ++count) {
          const std::size_t bit = (word + part) % shape.words() * 64 + static_cast<std::size_t>(std::countr_zero(left));
          const std::size_t value = next[bit / each]++;
          switch (shape.kind) {
            case SparseValues::kFloat32: std::memcpy(to + 4 * count, stored + 4 * value, 4); break;
            case SparseValues::kBfloat16: std::memcpy(to + 2 * count, stored + 2 * value, 2); break;
            case SparseValues::kInt8: to[count] = stored[value]; break;
            case SparseValues::kInt4: {
              const unsigned code = (stored[value / 2] >> (4 * (value % 2))) & 15U;
              to[count] = static_cast<std::uint8_t>(to[count] | (code << (4 * part)));
              break;
            }
          }
        }
      }
      to += bytes;
    }
  });
}

PackedLinear panel_of(const PackedLinear& weights, std::size_t panel, const std::uint8_t* codes) {
  PackedLinear one = weights;
  const std::size_t cell = panel * weights.groups * kPanel;
  one.codes = codes;
  one.scales = static_cast<const std::uint8_t*>(weights.scales) + cell * (weights.half_scales ? 2 : 4);
  if (weights.zeros != nullptr) one.zeros = weights.zeros + cell;
  if (weights.sums != nullptr) one.sums = weights.sums + panel * kPanel;
  one.outputs = std::min(kPanel, weights.outputs - panel * kPanel);
  one.panels = 1;
  return one;
}

LinearOutput panel_of(const LinearOutput& y, std::size_t panel) {
  LinearOutput one = y;
  const std::size_t output = panel * kPanel;
  one.values += output;
  if (y.bias != nullptr) one.bias += output;
  if (y.factor != nullptr) one.factor += output;
  if (y.residual != nullptr) one.residual += output;
  return one;
}

const std::uint8_t* expanded(const KernelTable& kernels, const SparseWeights& sparse, const PackedLinear& weights,
                             std::size_t panel, std::uint8_t raise) {
  static thread_local std::vector<std::uint8_t> held;
  constexpr std::size_t kLine = 64;
  const std::size_t bytes = sparse.steps * kStepBytes;
  if (held.size() < bytes + kLine) held.resize(bytes + kLine);
  std::uint8_t* codes = held.data() + (kLine - reinterpret_cast<std::uintptr_t>(held.data()) % kLine) % kLine;
  const SparseFill fill{weights.zeros == nullptr ? nullptr : weights.zeros + panel * weights.groups * kPanel,
                        weights.group / 4, static_cast<std::uint8_t>(weights.middle), raise};
  kernels.sparse_bytes->expand(sparse, {panel, 0, sparse.steps}, fill, codes);
  return codes;
}

}  // namespace graphwright
