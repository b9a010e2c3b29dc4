#include "sparse_block.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>

#include "sparse_linear.h"
#include "threads.h"

namespace graphwright {
namespace {

// Panels whose blocks meet a tile of rows one after another: more runs of them than threads, so that none waits long.
constexpr std::size_t kRunsOfThread = 8;

// Memory that begins a line, of the thread that asks.
template <typename T>
T* lines_of(std::vector<T>& held, std::size_t count) {
  constexpr std::size_t kLine = 64;
  if (held.size() < count + kLine / sizeof(T)) held.resize(count + kLine / sizeof(T));
  const std::size_t beyond = reinterpret_cast<std::uintptr_t>(held.data()) % kLine;
  return held.data() + (beyond == 0 ? 0 : (kLine - beyond) / sizeof(T));
}

std::int32_t four_codes(const std::uint8_t* codes, std::int32_t middle) {
  std::array<std::int8_t, 4> four{};
  for (std::size_t i = 0; i < four.size(); ++i) four[i] = static_cast<std::int8_t>(std::int32_t{codes[i]} - middle);
  return std::bit_cast<std::int32_t>(four);
}

// Of each output the blocks of a chunk, then outputs by how many they have.
void sort_chunk(const std::uint8_t* codes, std::size_t steps, std::int32_t middle, BlockedCodes& to) {
  static thread_local std::int32_t blocks[kPanel][kBlockedSteps];
  static thread_local std::uint8_t places[kPanel][kBlockedSteps];
  std::array<std::uint16_t, kPanel> counts{};
  for (std::size_t step = 0; step < steps; ++step, codes += kStepBytes) {
    for (std::size_t n = 0; n < kPanel; ++n) {
      const std::int32_t block = four_codes(codes + n * 4, middle);
      if (block == 0) continue;
      blocks[n][counts[n]] = block;
      places[n][counts[n]++] = static_cast<std::uint8_t>(step);
    }
  }
  BlockedChunk chunk{};
  chunk.begin = to.codes.size();
  for (std::size_t n = 0; n < kPanel; ++n) chunk.outputs[n] = static_cast<std::uint8_t>(n);
  std::stable_sort(chunk.outputs, chunk.outputs + kPanel,
                   [&](std::uint8_t a, std::uint8_t b) { return counts[a] < counts[b]; });
  for (std::size_t place = 0; place < kPanel; ++place) {
    const std::size_t n = chunk.outputs[place];
    chunk.starts[place + 1] = static_cast<std::uint16_t>(chunk.starts[place] + counts[n]);
    to.codes.insert(to.codes.end(), blocks[n], blocks[n] + counts[n]);
    to.places.insert(to.places.end(), places[n], places[n] + counts[n]);
  }
  to.chunks.push_back(chunk);
}

}  // namespace

std::vector<BlockedCodes> sort_blocks(const KernelTable& kernels, const SparseWeights& sparse, const PackedLinear& weights,
                                      std::size_t threads) {
  static_assert(kBlockedSteps <= 256 && kPanel * kBlockedSteps <= 65535);
  std::vector<BlockedCodes> panels(sparse.panels);
  parallel_for(sparse.panels, threads, [&](std::size_t panel) {
    const std::uint8_t* codes = expanded(kernels, sparse, weights, panel, 0);
    for (std::size_t step = 0; step < sparse.steps; step += kBlockedSteps, codes += kBlockedSteps * kStepBytes) {
      sort_chunk(codes, std::min(kBlockedSteps, sparse.steps - step), weights.middle, panels[panel]);
    }
    panels[panel].codes.shrink_to_fit();
    panels[panel].places.shrink_to_fit();
  });
  return panels;
}

void run_blocked(const KernelTable& kernels, const SparseWeights& sparse, const PackedLinear& weights, const ByteRows& rows,
                 const LinearOutput& y, std::size_t threads) {
  static thread_local std::vector<std::uint8_t> turned;
  const SparseByteKernels& own = *kernels.sparse_bytes;
  // Tiles of even height: one of a few rows would take as long as one with a vector full of them.
  const std::size_t tiles = (rows.rows + own.blocked_rows - 1) / own.blocked_rows;
  const std::size_t height = (rows.rows + tiles - 1) / tiles, width = (height + own.lanes - 1) / own.lanes * own.lanes;
  const std::size_t tile_bytes = sparse.steps * width * 4;
  std::uint8_t* codes = lines_of(turned, tiles * tile_bytes);
  const auto rows_of = [&](std::size_t tile) { return std::min(height, rows.rows - tile * height); };
  parallel_for(tiles, threads, [&](std::size_t tile) {
    own.turn(rows.codes + tile * height * sparse.steps * 4, rows_of(tile), sparse.steps, width, codes + tile * tile_bytes);
  });
  const std::size_t run = std::max<std::size_t>(1, sparse.panels / (threads * kRunsOfThread));
  const std::size_t runs = (sparse.panels + run - 1) / run;
  // A tile's codes stay in the second cache while all panels meet it.
  parallel_for(tiles * runs, threads, [&](std::size_t index) {
    static thread_local std::vector<std::int32_t> sums;
    const std::size_t tile = index / runs, first = index % runs * run;
    const TurnedCodes x{codes + tile * tile_bytes, tile * height, rows_of(tile), width};
    for (std::size_t panel = first; panel < std::min(first + run, sparse.panels); ++panel) {
      own.blocked(sparse.blocked[panel], weights, rows, x, y, {panel, sparse.outputs, sparse.steps},
                  lines_of(sums, 2 * kPanel * width));
    }
    // What went past the caches is seen by other threads only after this.
    if (y.past_caches) std::atomic_thread_fence(std::memory_order_seq_cst);
  });
}

}  // namespace graphwright
