#include "attention.h"

#include <algorithm>
#include <vector>

#include "scratch.h"
#include "threads.h"

namespace graphwright {
namespace {

// Rows for which keys are packed once; their queries and sums stay in the second cache.
constexpr std::size_t kMostRows = 44 * kAttentionRows, kLeastRows = 4 * kAttentionRows;
// With so few rows and heads, keys are shared out too, in parts of this many.
constexpr std::size_t kSplitRows = 16, kSplitHeads = 16, kPart = 2 * kAttentionKeys;
constexpr std::size_t kSoftmaxElements = 16384;

std::size_t blocks(std::size_t count, std::size_t size) { return (count + size - 1) / size; }

float* output_row(const Attention& call, std::size_t batch, std::size_t head, std::size_t query) {
  return call.out + static_cast<std::ptrdiff_t>(batch) * call.out_at.batch +
         static_cast<std::ptrdiff_t>(head) * call.out_at.head + static_cast<std::ptrdiff_t>(query) * call.out_at.position;
}

void clear(const Attention& call) {
  for (std::size_t batch = 0; batch < call.batches; ++batch) {
    for (std::size_t head = 0; head < call.key_heads * call.groups; ++head) {
      for (std::size_t query = 0; query < call.queries; ++query) {
        std::fill_n(output_row(call, batch, head, query), call.value_width, 0.0F);
      }
    }
  }
}

}  // namespace

void run_attention(const AttentionKernels& kernels, const Attention& call, std::size_t threads) {
  const std::size_t units = call.batches * call.key_heads, rows = call.queries * call.groups;
  if (units == 0 || rows == 0 || call.value_width == 0) return;
  if (call.keys == 0) return clear(call);
  // Enough blocks of rows to share out evenly.
  const std::size_t wanted = blocks(4 * threads, units);
  const std::size_t even = blocks(blocks(rows, wanted), kAttentionRows) * kAttentionRows;
  const std::size_t together = std::clamp(even, kLeastRows, kMostRows), pieces = blocks(rows, together);
  // Where the parts are cut depends on the call alone.
  const std::size_t parts = rows <= kSplitRows && units < kSplitHeads ? blocks(call.keys, kPart) : 1;
  const std::size_t stride = kPartialValues + call.value_width;
  static thread_local std::vector<float> held_parts;
  float* partial = parts > 1 ? scratch(held_parts, units * rows * parts * stride) : nullptr;
  parallel_for(units * pieces * parts, threads, [&](std::size_t index) {
    static thread_local std::vector<float> held;
    const std::size_t part = index % parts, unit = index / parts % units;
    const std::size_t piece = pieces - 1 - index / parts / units;  // the last rows see most keys
    AttentionBlock block{};
    block.batch = unit / call.key_heads;
    block.key_head = unit % call.key_heads;
    block.row_begin = piece * together;
    block.row_end = std::min(block.row_begin + together, rows);
    block.key_begin = parts > 1 ? part * kPart : 0;
    block.key_end = parts > 1 ? std::min(block.key_begin + kPart, call.keys) : call.keys;
    block.scratch = scratch(held, kernels.scratch(call, block.row_end - block.row_begin));
    if (partial != nullptr) {
      block.partial = partial + ((unit * rows + block.row_begin) * parts + part) * stride;
      block.partial_stride = parts * stride;
    }
    kernels.run(call, block);
  });
  if (partial == nullptr) return;
  for (std::size_t index = 0; index < units * rows; ++index) {
    const std::size_t unit = index / rows, row = index % rows;
    const std::size_t head = unit % call.key_heads * call.groups + row % call.groups;
    float* out = output_row(call, unit / call.key_heads, head, row / call.groups);
    kernels.combine(partial + index * parts * stride, parts, stride, call.value_width, out);
  }
}

void run_softmax(const AttentionKernels& kernels, const float* x, std::size_t rows, std::size_t columns, float* y,
                 std::size_t threads) {
  if (rows == 0 || columns == 0) return;
  const std::size_t together = std::max<std::size_t>(1, kSoftmaxElements / columns);
  parallel_for(blocks(rows, together), threads, [&](std::size_t index) {
    const std::size_t first = index * together;
    kernels.softmax(x + first * columns, std::min(together, rows - first), columns, y + first * columns);
  });
}

}  // namespace graphwright
