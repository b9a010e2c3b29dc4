#include "decoder_attention.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "scratch.h"
#include "threads.h"

namespace graphwright {
namespace {

// Up to so many rows for each key head, keys are shared out, in parts of this many and at most so many parts.
constexpr std::size_t kFewRows = 64, kPart = 2 * kAttentionKeys, kMostParts = 32;
// Beyond, rows are, in pieces of so many: keys are packed once for a piece, whose queries stay in the second cache.
constexpr std::size_t kMostRows = 44 * kAttentionRows, kLeastRows = 4 * kAttentionRows;
// Products that a thread must have to itself: with fewer, waking it takes longer. To read a key takes as long as to
// multiply it for so many rows.
constexpr std::size_t kEnough = 1 << 18, kReading = 2;
// Positions of one head that are appended at once.
constexpr std::size_t kAppended = 64;

std::size_t blocks(std::size_t count, std::size_t size) { return (count + size - 1) / size; }

Stored stored_as(Element element) {
  if (element == Element::kFloat) return Stored::kFloat;
  return element == Element::kBf16 ? Stored::kBf16 : Stored::kInt8;
}

std::ptrdiff_t bytes_of(Stored stored) {
  if (stored == Stored::kFloat) return 4;
  return stored == Stored::kBf16 ? 2 : 1;
}

template <typename T>
T* at(const Tensor& tensor, std::size_t first, std::size_t second = 0) {
  return static_cast<T*>(tensor.data) + static_cast<std::ptrdiff_t>(first) * tensor.strides[0] +
         static_cast<std::ptrdiff_t>(second) * tensor.strides[1];
}

void* at(const Tensor& tensor, Stored stored, std::size_t slot, std::size_t head) {
  return static_cast<std::uint8_t*>(tensor.data) + (static_cast<std::ptrdiff_t>(slot) * tensor.strides[0] +
                                                    static_cast<std::ptrdiff_t>(head) * tensor.strides[1]) *
                                                       bytes_of(stored);
}

HeadStrides head_strides(const Tensor& tensor) { return {0, tensor.strides[1], tensor.strides[2]}; }

Rotation rotation_of(const Tensor& cos, const Tensor& sin, std::size_t row, bool interleaved) {
  if (cos.data == nullptr) return {};
  const auto first = [row](const Tensor& angles) { return at<const float>(angles, angles.shape[0] == 1 ? 0 : row); };
  return {first(cos), first(sin), cos.strides[1], sin.strides[1], cos.shape[2], interleaved};
}

// What is left to do of each head of each row; who does the last of it sums up.
std::atomic<std::uint32_t>* counters(std::size_t count) {
  static thread_local std::unique_ptr<std::atomic<std::uint32_t>[]> held;
  static thread_local std::size_t size = 0;
  if (size < count) {
    held = std::make_unique<std::atomic<std::uint32_t>[]>(count);
    size = count;
  }
  for (std::size_t i = 0; i < count; ++i) held[i].store(0, std::memory_order_relaxed);
  return held.get();
}

float* task_scratch(std::size_t size) {
  static thread_local std::vector<float> held;
  return scratch(held, size);
}

float* partial_scratch(std::size_t size) {
  static thread_local std::vector<float> held;
  return scratch(held, size);
}

}  // namespace

struct DecoderAttention::Step {
  struct Place {
    std::size_t slot, start;
  };

  const Tensor* operands;
  const Place* places;  // of each row
  std::size_t rows, key_heads, groups, length, width, value_width, capacity;
  Stored stored;

  explicit Step(const Tensor* given)
      : operands(given), places(nullptr), rows(given[kQuery].shape[0]), key_heads(given[kKeys].shape[1]),
        groups(key_heads == 0 ? 0 : given[kQuery].shape[1] / key_heads), length(given[kQuery].shape[2]),
        width(given[kQuery].shape[3]), value_width(given[kValues].shape[3]), capacity(given[kKeys].shape[2]),
        stored(stored_as(given[kKeys].element)) {
    places = checked();
  }

  const Tensor& operator[](Operand operand) const { return operands[operand]; }
  std::size_t slot(std::size_t row) const { return places[row].slot; }
  std::size_t start(std::size_t row) const { return places[row].start; }
  std::size_t end(std::size_t row) const { return start(row) + length; }
  // The keys of a row begin here: what is before the window is left out, but for what shares its block.
  std::size_t first(std::size_t row, std::ptrdiff_t window) const {
    const auto hidden = static_cast<std::ptrdiff_t>(start(row)) - window + 1;
    return window == 0 || hidden <= 0 ? 0 : static_cast<std::size_t>(hidden) / kAttentionKeys * kAttentionKeys;
  }
  // Of a row, for its own keys alone: so its results do not depend on the other rows.
  std::size_t part(std::size_t row, std::ptrdiff_t window) const {
    const std::size_t keys = end(row) - first(row, window);
    return std::max(kPart, blocks(keys, kMostParts * kAttentionKeys) * kAttentionKeys);
  }

 private:
  // Read once, and not again: another thread of the program may write while this one looks.
  const Place* checked() const {
    static thread_local std::vector<Place> held;
    const std::size_t slots = operands[kKeys].shape[0];
    held.resize(std::max(held.size(), rows));
    for (std::size_t row = 0; row < rows; ++row) {
      const std::int64_t slot = *static_cast<const volatile std::int64_t*>(at<const std::int64_t>(operands[kSlots], row));
      const std::int64_t start = *static_cast<const volatile std::int64_t*>(at<const std::int64_t>(operands[kStarts], row));
      if (slot < 0 || static_cast<std::uint64_t>(slot) >= slots) {
        throw std::invalid_argument("row " + std::to_string(row) + " is in slot " + std::to_string(slot) +
                                    " of a cache that has " + std::to_string(slots));
      }
      if (start < 0 || length > capacity || static_cast<std::uint64_t>(start) > capacity - length) {
        throw std::invalid_argument("row " + std::to_string(row) + " begins at position " + std::to_string(start) +
                                    " and brings " + std::to_string(length) + " tokens to a cache of capacity " +
                                    std::to_string(capacity));
      }
      held[row] = {static_cast<std::size_t>(slot), static_cast<std::size_t>(start)};
      for (std::size_t other = 0; other < row; ++other) {
        if (held[other].slot != held[row].slot) continue;
        throw std::invalid_argument("rows " + std::to_string(other) + " and " + std::to_string(row) +
                                    " are both in slot " + std::to_string(slot));
      }
    }
    return held.data();
  }
};

DecoderAttention::DecoderAttention(const AttentionKernels& kernels, float scale, std::ptrdiff_t window, float softcap,
                                   std::vector<float> slopes, bool interleaved)
    : kernels_(kernels), scale_(scale), window_(window), softcap_(softcap), slopes_(std::move(slopes)),
      interleaved_(interleaved) {}

void DecoderAttention::run(const Tensor* operands, std::size_t threads) const {
  const Step step(operands);
  if (!slopes_.empty() && slopes_.size() != operands[kQuery].shape[1]) {
    throw std::invalid_argument("there must be one slope for each query head");
  }
  if (step.rows == 0 || step.key_heads == 0 || step.length == 0) return;
  std::size_t keys = 0;
  for (std::size_t row = 0; row < step.rows; ++row) keys += step.end(row) - step.first(row, window_);
  const std::size_t rows = step.groups * step.length;
  const std::size_t products = keys * step.key_heads * (rows + kReading) * (step.width + step.value_width);
  threads = std::min(threads, 1 + products / kEnough);
  if (rows <= kFewRows) run_few(step, threads);
  else run_many(step, threads);
}

Attention DecoderAttention::attention(const Step& step, std::size_t row) const {
  const std::size_t slot = step.slot(row);
  Attention call{};
  call.batches = 1;
  call.key_heads = step.key_heads;
  call.groups = step.groups;
  call.queries = step.length;
  call.keys = step.end(row);
  call.width = step.width;
  call.value_width = step.value_width;
  call.query = at<const float>(step[kQuery], row);
  call.query_at = head_strides(step[kQuery]);
  call.rotation = rotation_of(step[kCos], step[kSin], row, interleaved_);
  call.stored = step.stored;
  call.key = at(step[kKeys], step.stored, slot, 0);
  call.key_at = head_strides(step[kKeys]);
  call.value = at(step[kValues], step.stored, slot, 0);
  call.value_at = head_strides(step[kValues]);
  if (step.stored == Stored::kInt8) {
    call.key_scales = at<const float>(step[kKeyScales], slot);
    call.key_scales_at = head_strides(step[kKeyScales]);
    call.value_scales = at<const float>(step[kValueScales], slot);
    call.value_scales_at = head_strides(step[kValueScales]);
  }
  call.softcap = softcap_;
  call.slopes = slopes_.empty() ? nullptr : slopes_.data();
  call.out = at<float>(step[kOutput], row);
  call.out_at = head_strides(step[kOutput]);
  call.scale = scale_;
  call.causal = true;
  call.window = window_;
  call.offset = static_cast<std::ptrdiff_t>(step.start(row));
  return call;
}

// Tokens [begin, end) of the step.
void DecoderAttention::append(const Step& step, std::size_t row, std::size_t head, std::size_t begin, std::size_t end,
                              float* scratch) const {
  const std::size_t slot = step.slot(row);
  const auto start = static_cast<std::ptrdiff_t>(step.start(row));
  const auto one = [&](Operand from, Operand cache, Operand scales, const Rotation& rotation) {
    CacheRows rows{};
    rows.x = at<const float>(step[from], row, head);
    rows.x_position = step[from].strides[2];
    rows.width = step[from].shape[3];
    rows.rotation = rotation;
    rows.stored = step.stored;
    rows.cache_position = step[cache].strides[2];
    rows.cache = static_cast<std::uint8_t*>(at(step[cache], step.stored, slot, head)) +
                 start * rows.cache_position * bytes_of(step.stored);
    if (step.stored == Stored::kInt8) {
      rows.scales_position = step[scales].strides[2];
      rows.scales = at<float>(step[scales], slot, head) + start * rows.scales_position;
    }
    rows.scratch = scratch;
    kernels_.append(rows, begin, end);
  };
  one(kKey, kKeys, kKeyScales, rotation_of(step[kCos], step[kSin], row, interleaved_));
  one(kValue, kValues, kValueScales, {});
}

// A part of a head's keys at a time. A part brings its own new keys into the cache, so that none waits for another.
void DecoderAttention::run_few(const Step& step, std::size_t threads) const {
  const std::size_t units = step.rows * step.key_heads, rows = step.groups * step.length;
  const auto parts_of = [&](std::size_t row) {
    return blocks(step.end(row) - step.first(row, window_), step.part(row, window_));
  };
  std::size_t most = 0;
  for (std::size_t row = 0; row < step.rows; ++row) most = std::max(most, parts_of(row));
  const std::size_t stride = kPartialValues + step.value_width;
  // Of the size that a full cache needs, so that it does not grow with every token.
  const std::size_t room = most > 1 ? std::min(kMostParts, blocks(step.capacity, kPart)) : 0;
  float* const partial = partial_scratch(units * rows * room * stride);
  std::atomic<std::uint32_t>* const done = counters(most > 1 ? units : 0);
  parallel_for(units * most, threads, [&](std::size_t index) {
    const std::size_t part = index % most, unit = index / most, row = unit / step.key_heads, head = unit % step.key_heads;
    const std::size_t parts = parts_of(row), size = step.part(row, window_), start = step.start(row);
    if (part >= parts) return;
    const Attention call = attention(step, row);
    const std::size_t needed = kernels_.scratch(call, rows);
    float* const scratch = task_scratch(needed + step.width);
    AttentionBlock block{};
    block.key_head = head;
    block.row_end = rows;
    block.key_begin = step.first(row, window_) + part * size;
    block.key_end = std::min(block.key_begin + size, call.keys);
    block.scratch = scratch;
    float* const own = partial + unit * rows * room * stride;
    if (parts > 1) {
      block.partial = own + part * stride;
      block.partial_stride = parts * stride;
    }
    if (block.key_end > start) {
      append(step, row, head, std::max(block.key_begin, start) - start, block.key_end - start, scratch + needed);
    }
    kernels_.run(call, block);
    if (parts == 1 || done[unit].fetch_add(1, std::memory_order_acq_rel) + 1 < parts) return;
    for (std::size_t i = 0; i < rows; ++i) {
      float* const out = call.out + static_cast<std::ptrdiff_t>(head * step.groups + i % step.groups) * call.out_at.head +
                         static_cast<std::ptrdiff_t>(i / step.groups) * call.out_at.position;
      kernels_.combine(own + i * parts * stride, parts, stride, step.value_width, out);
    }
  });
}

// All new keys first, and then a piece of a head's queries at a time.
void DecoderAttention::run_many(const Step& step, std::size_t threads) const {
  const std::size_t units = step.rows * step.key_heads, rows = step.groups * step.length;
  const std::size_t chunks = blocks(step.length, kAppended);
  parallel_for(units * chunks, threads, [&](std::size_t index) {
    const std::size_t unit = index / chunks, begin = index % chunks * kAppended;
    append(step, unit / step.key_heads, unit % step.key_heads, begin, std::min(begin + kAppended, step.length),
           task_scratch(step.width));
  });
  const std::size_t even = blocks(blocks(rows, blocks(4 * threads, units)), kAttentionRows) * kAttentionRows;
  const std::size_t together = std::clamp(even, kLeastRows, kMostRows), pieces = blocks(rows, together);
  parallel_for(units * pieces, threads, [&](std::size_t index) {
    const std::size_t unit = index % units, piece = pieces - 1 - index / units;  // the last rows see most keys
    const std::size_t row = unit / step.key_heads;
    const Attention call = attention(step, row);
    AttentionBlock block{};
    block.key_head = unit % step.key_heads;
    block.row_begin = piece * together;
    block.row_end = std::min(block.row_begin + together, rows);
    block.key_begin = step.first(row, window_);
    block.key_end = call.keys;
    block.scratch = task_scratch(kernels_.scratch(call, block.row_end - block.row_begin));
    kernels_.run(call, block);
  });
}

}  // namespace graphwright
