#include "float_linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "sparse_linear.h"
#include "sparse_skip.h"
#include "threads.h"

namespace graphwright {
namespace {

// Rows that are taken together for each block of weights: with their sums they stay in the second cache.
constexpr std::size_t kRowsAtOnce = 192;
// Rows are shared out among threads where there are few panels, but not so far that nobody has a full tile.
constexpr std::size_t kLeastRows = 24;

// Memory of one thread, at a cache line's start; it grows to what the largest call asked for.
template <typename T>
class Scratch {
 public:
  T* of(std::size_t size) {
    if (held_.size() < size + kLine) held_.resize(size + kLine);
    const auto address = reinterpret_cast<std::uintptr_t>(held_.data());
    return held_.data() + (kLine * sizeof(T) - address % (kLine * sizeof(T))) / sizeof(T);
  }

 private:
  static constexpr std::size_t kLine = 64 / sizeof(T);
  std::vector<T> held_;
};

// A thread is woken for ten microseconds of work at least, here in columns of a panel times rows. Below three rows time
// goes into reading weights.
constexpr std::size_t kWorthwhile = 20000;

// The same in products of a narrow linear.
constexpr std::size_t kNarrowWorthwhile = std::size_t{1} << 16;

std::size_t panels_of(std::size_t outputs) { return (outputs + kPanel - 1) / kPanel; }

std::uint16_t to_bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return static_cast<std::uint16_t>((bits >> 16U) | 64U);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U);
}

// Transposes panels, a few columns at a time so that what is written stays in the cache. `kSide` values of an output stand
// side by side.
template <typename To, std::size_t kSide, typename From, typename Convert>
void pack_panels(const From* stored, std::size_t outputs, std::size_t columns, std::uint8_t* values, std::size_t threads,
                 const Convert& convert) {
  constexpr std::size_t kChunk = 32;
  const std::size_t steps = (columns + kSide - 1) / kSide;
  parallel_for(panels_of(outputs), threads, [&](std::size_t panel) {
    std::uint8_t* target = values + panel * steps * kStepBytes;
    const std::size_t here = std::min(kPanel, outputs - panel * kPanel);
    if (here < kPanel || columns % kSide != 0) std::memset(target, 0, steps * kStepBytes);
    for (std::size_t begin = 0; begin < columns; begin += kChunk) {
      const std::size_t end = std::min(begin + kChunk, columns);
      for (std::size_t n = 0; n < here; ++n) {
        const From* row = stored + (panel * kPanel + n) * columns;
        for (std::size_t k = begin; k < end; ++k) {
          const To value = convert(row[k]);
          std::memcpy(target + ((k / kSide * kPanel + n) * kSide + k % kSide) * sizeof(To), &value, sizeof(To));
        }
      }
    }
  });
}

// Rows as the kernels of bfloat16 products want them.
FloatRows rounded_rows(const FloatLinearKernels& kernels, const float* x, std::size_t rows, std::size_t columns,
                       std::size_t threads) {
  static thread_local Scratch<float> held;
  const std::size_t padded = columns + columns % 2, bytes = kernels.pairs ? 2 : 4;
  auto* to = reinterpret_cast<std::uint8_t*>(held.of((rows * padded * bytes + 3) / 4));
  const std::size_t piece = std::max<std::size_t>(1, 16384 / padded), pieces = (rows + piece - 1) / piece;
  parallel_for(pieces, threads, [&](std::size_t index) {
    for (std::size_t row = index * piece; row < std::min(rows, (index + 1) * piece); ++row) {
      kernels.round_row(x + row * columns, columns, padded, to + row * padded * bytes);
    }
  });
  return {to, padded};
}

std::size_t worthwhile(std::size_t panels, std::size_t columns, std::size_t rows, std::size_t threads) {
  return std::min(threads, 1 + panels * columns * std::max<std::size_t>(rows, 3) / kWorthwhile);
}

// Calls `work(block)` for parts of the product. The parts of one panel's rows follow one another: its weights are in the
// cache then.
template <typename Work>
void for_blocks(std::size_t panels, std::size_t rows, std::size_t threads, bool unpacks, const LinearOutput& y,
                const Work& work) {
  std::size_t parts = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  while (threads > 1 && parts * panels < 4 * threads && rows / (parts + 1) >= kLeastRows) ++parts;
  const std::size_t together = (rows + parts - 1) / parts;
  // Several tasks for each thread, so that none waits long for another.
  const std::size_t run = std::clamp<std::size_t>(parts * panels / (threads * 8), 1, panels);
  const std::size_t runs = (panels + run - 1) / run;
  parallel_for(parts * runs, threads, [&](std::size_t index) {
    static thread_local Scratch<float> sums, weights;
    FloatBlock block{};
    block.panel_begin = index / parts * run;
    block.panel_end = std::min(block.panel_begin + run, panels);
    block.row_begin = std::min(rows, index % parts * together);
    block.row_end = std::min(rows, block.row_begin + together);
    block.sums = sums.of(kPanelsAtOnce * together * kPanel);
    if (unpacks) block.weights = reinterpret_cast<std::uint8_t*>(weights.of(kBlockSteps * kStepBytes / 4));
    work(block);
    // What went past the caches is seen by other threads only after this.
    if (y.past_caches) std::atomic_thread_fence(std::memory_order_seq_cst);
  });
}

// Four sums side by side: one would wait for each of its additions.
float sum_of(const float* values, std::size_t count) {
  double parts[4] = {};
  for (std::size_t i = 0; i < count; ++i) parts[i % 4] += static_cast<double>(values[i]);
  return static_cast<float>((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

// A few rows, every group padded with 0, and the sums of groups.
GroupedRows grouped_rows(const CodedWeights& weights, const float* x, std::size_t rows) {
  static thread_local Scratch<float> values, sums;
  const PackedLinear& packed = weights.packed;
  const std::size_t stride = packed.groups * packed.group;
  const bool padded = packed.group != weights.group_size || stride != weights.columns;
  float* to = padded ? values.of(rows * stride) : nullptr;
  float* sum = packed.zeros == nullptr ? nullptr : sums.of(rows * packed.groups);
  for (std::size_t row = 0; row < rows && (padded || sum != nullptr); ++row) {
    for (std::size_t group = 0; group < packed.groups; ++group) {
      const std::size_t begin = group * weights.group_size, size = std::min(weights.group_size, weights.columns - begin);
      const float* from = x + row * weights.columns + begin;
      if (padded) {
        float* target = to + row * stride + group * packed.group;
        std::copy_n(from, size, target);
        std::fill_n(target + size, packed.group - size, 0.0F);
      }
      if (sum != nullptr) sum[row * packed.groups + group] = sum_of(from, size);
    }
  }
  return {padded ? to : x, sum};
}

// A block of a linear on codes. Sparse ones are expanded first, a panel at a time in the cache, as 8-bit codes.
template <typename Kernel, typename Rows>
void run_codes(const KernelTable& kernels, const SparseWeights* sparse, Kernel kernel, const CodedWeights& weights,
               const Rows& rows, const LinearOutput& y, FloatBlock block) {
  if (sparse == nullptr) return kernel(weights, rows, y, block);
  const auto raise = static_cast<std::uint8_t>(128 - weights.packed.middle);
  CodedWeights one = weights;
  const std::size_t begin = block.panel_begin, end = block.panel_end;
  for (std::size_t panel = begin; panel < end; ++panel) {
    one.packed = panel_of(weights.packed, panel, expanded(kernels, *sparse, weights.packed, panel, raise));
    block.panel_begin = 0;
    block.panel_end = 1;
    kernel(one, rows, panel_of(y, panel), block);
  }
}

bool all_finite(const float* values, std::size_t count) {
  return std::all_of(values, values + count, [](float value) { return std::isfinite(value); });
}

}  // namespace

std::size_t dense_bytes(std::size_t outputs, std::size_t columns, bool bfloat16) {
  return panels_of(outputs) * (bfloat16 ? (columns + 1) / 2 : columns) * kStepBytes;
}

void pack_dense(const float* stored, bool bfloat16, std::size_t outputs, std::size_t columns, std::uint8_t* values,
                std::size_t threads) {
  const auto rounded = [](float value) { return to_bfloat16(value); };
  const auto same = [](float value) { return value; };
  if (bfloat16) pack_panels<std::uint16_t, 2>(stored, outputs, columns, values, threads, rounded);
  else pack_panels<float, 1>(stored, outputs, columns, values, threads, same);
}

void pack_dense(const std::uint16_t* stored, std::size_t outputs, std::size_t columns, std::uint8_t* values,
                std::size_t threads) {
  const auto same = [](std::uint16_t value) { return value; };
  pack_panels<std::uint16_t, 2>(stored, outputs, columns, values, threads, same);
}

void run_dense_linear(const KernelTable& kernels, const DenseWeights& weights, bool bfloat16, const float* x,
                      std::size_t rows, const LinearOutput& y, std::size_t threads) {
  if (rows == 0) return;
  const FloatLinearKernels& own = *kernels.float_linear;
  threads = worthwhile(panels_of(weights.outputs), weights.columns, rows, threads);
  const FloatRows values =
      bfloat16 ? rounded_rows(own, x, rows, weights.columns, threads) : FloatRows{x, weights.columns};
  for_blocks(panels_of(weights.outputs), rows, threads, false, y, [&](const FloatBlock& block) {
    (bfloat16 ? own.bfloat16 : own.float32)(weights, values, y, block);
  });
}

void run_narrow_linear(const KernelTable& kernels, const NarrowWeights& weights, bool bfloat16, const float* x,
                       std::size_t rows, const LinearOutput& y, std::size_t threads) {
  const FloatLinearKernels& own = *kernels.float_linear;
  // Rows are shared out; with few of them outputs, eight at a time, where each thread has enough to read.
  const std::size_t products = rows * weights.outputs * weights.columns;
  threads = std::min(threads, 1 + products / kNarrowWorthwhile);
  const bool by_rows = threads == 1 || rows >= 4 * threads;
  const std::size_t high = by_rows ? std::max<std::size_t>(4, (rows + 8 * threads - 1) / (8 * threads)) : rows;
  const std::size_t wide = by_rows ? weights.outputs : 8;
  const std::size_t runs = rows == 0 ? 0 : (rows + high - 1) / high, parts = (weights.outputs + wide - 1) / wide;
  parallel_for(runs * parts, threads, [&](std::size_t index) {
    const std::size_t row = index / parts * high, output = index % parts * wide;
    const NarrowBlock block{row, std::min(rows, row + high), output, std::min(weights.outputs, output + wide)};
    (bfloat16 ? own.narrow_bfloat16 : own.narrow_float32)(weights, x, y, block);
    if (y.past_caches) std::atomic_thread_fence(std::memory_order_seq_cst);
  });
}

// From so many rows on zeros may be skipped.
constexpr std::size_t kSkipRows = 32;

namespace {

// Rows as kernels that skip zeros want them; empty where one is not finite.
TurnedRows turned_rows(const SparseFloatKernels& kernels, const float* x, std::size_t rows, std::size_t columns,
                       std::size_t threads) {
  static thread_local Scratch<float> held;
  TurnedRows to{nullptr, rows, 0, 0, (rows + kernels.most_rows - 1) / kernels.most_rows};
  to.height = (rows + to.tiles - 1) / to.tiles;
  to.width = (to.height + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  to.tiles = (rows + to.height - 1) / to.height;
  float* values = held.of(to.tiles * columns * to.width);
  // Whole vectors of columns, so that two threads never write one line.
  const std::size_t piece = std::max<std::size_t>(64, (columns / (2 * threads) + 63) / 64 * 64);
  const std::size_t pieces = (columns + piece - 1) / piece;
  std::atomic<bool> finite{true};
  parallel_for(to.tiles * pieces, threads, [&](std::size_t index) {
    const std::size_t row = index / pieces * to.height, column = index % pieces * piece;
    const std::size_t here = std::min(to.height, rows - row), wide = std::min(piece, columns - column);
    float* target = values + (index / pieces * columns + column) * to.width;
    if (!kernels.turn(x + row * columns + column, columns, here, wide, to.width, target)) finite.store(false);
  });
  if (finite.load()) to.values = values;
  return to;
}

// Measured (Zen 3): skipping takes 0.19 + 1.25 d of the dense kernel's time where a share d is not zero, and sorting the
// weights for one call as long as 140 rows of what is not zero.
bool skipping_pays(const SparseWeights& weights, std::size_t rows, bool sorted) {
  const double bytes = weights.kind == SparseValues::kBfloat16 ? 2.0 : 4.0;
  const double stored = static_cast<double>(weights.offsets[weights.panels * weights.blocks()]) / bytes;
  const double share = stored / (static_cast<double>(weights.outputs) * static_cast<double>(weights.steps));
  return rows >= kSkipRows && static_cast<double>(rows) * (0.81 - 1.25 * share) >= (sorted ? 0.0 : 140.0 * share);
}

}  // namespace

void run_sparse_linear(const KernelTable& kernels, const SparseWeights& weights, const SkipWeights* skipped, const float* x,
                       std::size_t rows, const LinearOutput& y, std::size_t threads) {
  if (rows == 0) return;
  const SparseFloatKernels& own = *kernels.sparse_floats;
  threads = worthwhile(weights.panels, weights.steps, rows, threads);
  if (skipping_pays(weights, rows, skipped != nullptr)) {
    const TurnedRows turned = turned_rows(own, x, rows, weights.steps, threads);
    if (turned.values != nullptr) {
      parallel_for(weights.panels, threads, [&](std::size_t panel) {
        static thread_local Scratch<float> held;
        static thread_local SkipWeights sorted;
        if (skipped == nullptr) sort_panel(weights, panel, sorted);
        const SkipPanel own_panel = (skipped == nullptr ? sorted : skipped[panel]).view();
        own.skip(own_panel, turned, y, {panel, weights.outputs, weights.steps},
                 held.of(2 * turned.tiles * kPanel * turned.width));
        // What went past the caches is seen by other threads only after this.
        if (y.past_caches) std::atomic_thread_fence(std::memory_order_seq_cst);
      });
      return;
    }
  }
  const FloatRows values{x, weights.steps};
  for_blocks(weights.panels, rows, threads, true, y, [&](const FloatBlock& block) {
    own.run(weights, values, y, block);
  });
}

void run_coded_linear(const KernelTable& kernels, const CodedWeights& weights, bool bfloat16, const float* x,
                      std::size_t rows, const LinearOutput& y, std::size_t threads, const SparseWeights* sparse) {
  if (rows == 0) return;
  const FloatLinearKernels& own = *kernels.float_linear;
  const std::size_t panels = weights.packed.panels;
  bfloat16 = bfloat16 && own.pairs;
  threads = worthwhile(panels, weights.columns, rows, threads);
  if (rows <= (bfloat16 ? kFewRowsBfloat16 : kFewRows)) {
    const GroupedRows few = grouped_rows(weights, x, rows);
    // Zero points are taken off sums: of an infinite sum that would leave NaN where there is infinity.
    if (few.sums == nullptr || all_finite(few.sums, rows * weights.packed.groups)) {
      for_blocks(panels, rows, threads, false, y, [&](const FloatBlock& block) {
        run_codes(kernels, sparse, own.coded_few, weights, few, y, block);
      });
      return;
    }
    bfloat16 = false;
  }
  const FloatRows values =
      bfloat16 ? rounded_rows(own, x, rows, weights.columns, threads) : FloatRows{x, weights.columns};
  for_blocks(panels, rows, threads, true, y, [&](const FloatBlock& block) {
    run_codes(kernels, sparse, bfloat16 ? own.coded_bfloat16 : own.coded_float32, weights, values, y, block);
  });
}

}  // namespace graphwright
