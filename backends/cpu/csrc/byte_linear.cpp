#include "byte_linear.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "sparse_block.h"
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

// Rows as gathered weights read them.
RaisedRows raise_rows(const ByteRows& rows, std::size_t columns, std::size_t threads) {
  static thread_local std::vector<std::uint8_t> held;
  // An odd number of lines, so that rows below each other do not share their places in the first cache.
  constexpr std::size_t kLine = 64;
  const std::size_t stride = (std::max(columns, kWindow) / kLine | 1) * kLine + 2 * kLine;
  std::uint8_t* codes = scratch(held, rows.rows * stride + kLine);
  codes += (kLine - reinterpret_cast<std::uintptr_t>(codes) % kLine) % kLine;
  constexpr std::size_t kPiece = 8;
  parallel_for((rows.rows + kPiece - 1) / kPiece, threads, [&](std::size_t index) {
    for (std::size_t row = index * kPiece; row < std::min(rows.rows, (index + 1) * kPiece); ++row) {
      const auto* from = reinterpret_cast<const std::uint8_t*>(rows.codes) + row * columns;
      std::uint8_t* to = codes + row * stride;
      for (std::size_t i = 0; i < columns; ++i) to[i] = static_cast<std::uint8_t>(from[i] ^ 128U);
    }
  });
  return {codes, stride};
}

}  // namespace

std::int16_t* memory_of_wide_rows(std::size_t count) {
  static thread_local std::vector<std::int16_t> held;
  return scratch(held, count);
}

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

  const bool many = sparse != nullptr && rows > kernels.sparse_bytes->few_rows;
  if (many && sparse->blocked != nullptr) return run_blocked(kernels, *sparse, weights, bytes, y, threads);
  const bool gathers = many && sparse->gathered != nullptr;
  const RaisedRows raised = gathers ? raise_rows(bytes, padded, threads) : RaisedRows{};
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
    else if (gathers) kernels.sparse_bytes->gathered(*sparse->gathered, weights, bytes, raised, y, block);
    else run_sparse(kernels, *sparse, weights, bytes, y, block);
    // What went past the caches is seen by other threads only after this.
    if (y.past_caches) std::atomic_thread_fence(std::memory_order_seq_cst);
  });
}

}  // namespace graphwright
