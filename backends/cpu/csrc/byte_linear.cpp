#include "byte_linear.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "sparse_linear.h"
#include "threads.h"

namespace graphwright {
namespace {

// Rows that are taken together for each panel: their codes stay in the second cache.
constexpr std::size_t kRowsAtOnce = 192;
// Rows are shared out among the threads, not the weights, where each has so many at least.
constexpr std::size_t kRowsOfThread = 32;
// Up to so many rows the weights are read once (linear_bytes.inc).
constexpr std::size_t kFewByteRows = 4;

// What a call needs besides its operands. One for each thread; it grows to what the largest call asked for.
template <typename T>
T* scratch(std::vector<T>& held, std::size_t size) {
  if (held.size() < size) held.resize(size);
  return held.data();
}

struct Workspace {
  std::vector<std::int8_t> codes;
  std::vector<float> scales;
  std::vector<std::int32_t> sums, shifts;
};

void round_rows(const ByteRowsKernels& kernels, const ActivationGrid& grid, const float* x, const RowShape& shape,
                std::size_t groups, const ByteRows& to, std::size_t threads) {
  const std::size_t piece = std::max<std::size_t>(1, 16384 / shape.padded), pieces = (shape.rows + piece - 1) / piece;
  parallel_for(pieces, threads, [&](std::size_t index) {
    const std::size_t first = index * piece;
    RowShape part = shape;
    part.rows = std::min(piece, shape.rows - first);
    const float* from = x + first * shape.stride;
    auto* codes = const_cast<std::int8_t*>(to.codes) + first * shape.padded;
    auto* sums = const_cast<std::int32_t*>(to.sums) + first * groups;
    auto* scales = const_cast<float*>(to.scales) + first * (to.scale_per_group ? groups : 1);
    switch (grid.rounding) {
      case Rounding::kSymmetric: kernels.symmetric(from, part, codes, scales, sums); break;
      case Rounding::kShifted:
        kernels.shifted(from, part, codes, scales, const_cast<std::int32_t*>(to.shifts) + first, sums);
        break;
      case Rounding::kFixed:
        kernels.fixed(from, part, grid.steps, grid.inverses, grid.zero, codes, scales, sums);
        std::fill_n(const_cast<std::int32_t*>(to.shifts) + first, part.rows, grid.zero - 128);
        break;
    }
  });
}

// A block whose codes are expanded first: in registers, or a panel at a time in the cache.
void run_sparse(const KernelTable& kernels, const SparseWeights& sparse, const PackedLinear& weights, const ByteRows& rows,
                const LinearOutput& y, const LinearBlock& block) {
  const SparseByteKernels& own = *kernels.sparse_bytes;
  if (own.few != nullptr && block.row_end - block.row_begin <= own.few_rows) {
    return own.few(sparse, weights, rows, y, block);
  }
  for (std::size_t panel = block.panel_begin; panel < block.panel_end; ++panel) {
    const PackedLinear one = panel_of(weights, panel, expanded(kernels, sparse, weights, panel, 0));
    kernels.byte_linear->run(one, rows, panel_of(y, panel), {0, 1, block.row_begin, block.row_end});
  }
}

// With so many rows, and so few blocks of four columns that are not zero, those are multiplied alone.
constexpr std::size_t kSkipRows = 32;
constexpr double kSkipBlocks = 0.4;

bool skips_blocks(const KernelTable& kernels, const SparseWeights& sparse, const PackedLinear& weights, std::size_t rows) {
  return kernels.sparse_bytes->skip != nullptr && rows >= kSkipRows && weights.groups == 1 && weights.zeros == nullptr &&
         weights.sums != nullptr && sparse.some_blocks <= kSkipBlocks;
}

void run_skipping(const KernelTable& kernels, const SparseWeights& sparse, const PackedLinear& weights, const ByteRows& rows,
                  const LinearOutput& y, std::size_t threads) {
  static thread_local std::vector<std::uint8_t> held;
  const SparseByteKernels& own = *kernels.sparse_bytes;
  TurnedBytes turned{nullptr, rows.scales, rows.rows, 0, 0, (rows.rows + own.most_rows - 1) / own.most_rows};
  turned.height = (rows.rows + turned.tiles - 1) / turned.tiles;
  turned.width = (turned.height + own.lanes - 1) / own.lanes * own.lanes;
  turned.tiles = (rows.rows + turned.height - 1) / turned.height;
  const std::size_t stride = weights.group, tile_bytes = sparse.steps * turned.width * 4;
  std::uint8_t* codes = scratch(held, turned.tiles * tile_bytes);
  // Whole lines, so that two threads never write one.
  const std::size_t piece = std::max<std::size_t>(16, (sparse.steps / (2 * threads) + 15) / 16 * 16);
  const std::size_t pieces = (sparse.steps + piece - 1) / piece;
  parallel_for(turned.tiles * pieces, threads, [&](std::size_t index) {
    const std::size_t tile = index / pieces, row = tile * turned.height, step = index % pieces * piece;
    own.turn(rows.codes + row * stride + step * 4, stride, std::min(turned.height, rows.rows - row),
             std::min(piece, sparse.steps - step), turned.width, codes + tile * tile_bytes + step * turned.width * 4);
  });
  turned.codes = codes;
  parallel_for(weights.panels, threads, [&](std::size_t panel) {
    static thread_local std::vector<float> sums;
    own.skip(sparse, weights, turned, y, panel, scratch(sums, (turned.tiles + 1) * kPanel * turned.width));
    // What went past the caches is seen by other threads only after this.
    if (y.past_caches) std::atomic_thread_fence(std::memory_order_seq_cst);
  });
}

}  // namespace

void pack_codes(const std::uint8_t* stored, std::int32_t bits, std::size_t outputs, std::size_t groups,
                std::size_t group_bytes, std::uint8_t* codes, std::size_t threads) {
  const std::size_t steps = (group_bytes + 3) / 4, panels = (outputs + kPanel - 1) / kPanel;
  parallel_for(panels, threads, [&](std::size_t panel) {
    std::uint8_t* target = codes + panel * groups * steps * kStepBytes;
    const std::size_t here = std::min(kPanel, outputs - panel * kPanel);
    std::fill_n(target, groups * steps * kStepBytes, std::uint8_t{0});
    for (std::size_t n = 0; n < here; ++n) {
      const std::uint8_t* row = stored + (panel * kPanel + n) * groups * group_bytes;
      for (std::size_t g = 0; g < groups; ++g) {
        for (std::size_t step = 0; step < steps; ++step) {
          std::uint8_t four[4] = {0, 0, 0, 0};
          const std::size_t count = std::min<std::size_t>(4, group_bytes - step * 4);
          std::copy_n(row + g * group_bytes + step * 4, count, four);
          std::uint8_t* dword = target + ((g * steps + step) * kPanel + n) * 4;
          if (bits == 8) {
            std::copy_n(four, 4, dword);
            continue;
          }
          const auto width = static_cast<unsigned>(bits), each = 8 / width;  // codes in a byte
          for (unsigned column = 0; column < 4 * each; ++column) {
            const unsigned code = (four[column / each] >> (column % each * width)) & ((1U << width) - 1U);
            dword[column % 4] = static_cast<std::uint8_t>(dword[column % 4] | (code << (column / 4 * width)));
          }
        }
      }
    }
  });
}

void run_byte_linear(const KernelTable& kernels, const PackedLinear& weights, const ActivationGrid& grid, const float* x,
                     std::size_t rows, std::size_t columns, const LinearOutput& y, std::size_t threads,
                     const SparseWeights* sparse) {
  if (rows == 0) return;
  static thread_local Workspace work;
  const std::size_t padded = weights.groups * weights.group;
  const bool symmetric = grid.rounding == Rounding::kSymmetric;
  const ByteRows bytes{scratch(work.codes, rows * padded),
                       scratch(work.scales, rows * weights.groups),
                       scratch(work.sums, rows * weights.groups),
                       symmetric ? nullptr : scratch(work.shifts, rows),
                       rows,
                       symmetric};
  const RowShape shape{rows, columns, columns, padded, weights.group};
  round_rows(*kernels.byte_rows, grid, x, shape, weights.groups, bytes, threads);

  if (sparse != nullptr && skips_blocks(kernels, *sparse, weights, rows)) {
    return run_skipping(kernels, *sparse, weights, bytes, y, threads);
  }
  const bool few = rows <= kFewByteRows;
  // Each thread has rows of its own where there are many: those that it wrote before, and that it will read next.
  const std::size_t at_least = std::clamp<std::size_t>(rows / kRowsOfThread, 1, threads);
  const std::size_t parts = few ? 1 : std::max(at_least, (rows + kRowsAtOnce - 1) / kRowsAtOnce);
  // Whole runs of panels, so that each thread streams; more of them than threads, so that none waits long for another.
  const std::size_t run = std::max<std::size_t>(1, weights.panels / (threads * (few ? 4 : 8)));
  const std::size_t runs = (weights.panels + run - 1) / run;
  parallel_for(parts * runs, threads, [&](std::size_t index) {
    LinearBlock block{};
    block.panel_begin = index % runs * run;
    block.panel_end = std::min(block.panel_begin + run, weights.panels);
    block.row_begin = rows * (index / runs) / parts;
    block.row_end = rows * (index / runs + 1) / parts;
    if (sparse == nullptr) kernels.byte_linear->run(weights, bytes, y, block);
    else run_sparse(kernels, *sparse, weights, bytes, y, block);
    // What went past the caches is seen by other threads only after this.
    if (y.past_caches) std::atomic_thread_fence(std::memory_order_seq_cst);
  });
}

}  // namespace graphwright
