// The kernels of attention and of softmax. Plain data: see kernel_table.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace graphwright {

// How keys and values are stored. Bytes have one float32 scale for each batch, head and position: value = code * scale.
enum class Stored { kFloat, kBf16, kInt8 };

// Strides of [batch][head][position][width], in elements; the last axis is contiguous.
struct HeadStrides {
  std::ptrdiff_t batch, head, position;
};

// Turns the pairs of the first `width` features by a position's angles. Without `cos` nothing is turned.
struct Rotation {
  const float *cos, *sin;  // [positions][width], features contiguous
  std::ptrdiff_t cos_position, sin_position;
  std::size_t width;
  bool interleaved;  // pairs are neighbours, not halves
};

struct Attention {
  // Query head h reads key head h / groups.
  std::size_t batches, key_heads, groups, queries, keys, width, value_width;
  const float* query;
  HeadStrides query_at;
  Rotation rotation;  // of the queries, in every batch alike
  Stored stored;
  const void *key, *value;
  HeadStrides key_at, value_at;
  const float *key_scales, *value_scales;  // null unless stored as bytes
  HeadStrides key_scales_at, value_scales_at;
  const std::int8_t* key_mask;  // 1 where a key may be attended, 0 elsewhere; or null
  std::ptrdiff_t key_mask_batch, key_mask_position;
  // Added to the scores, or 1 where a score counts; at most one of the two. Strides are 0 along an axis it does not have.
  const float* bias;
  const std::int8_t* keep;
  std::ptrdiff_t bias_at[4];
  float softcap;        // above 0: scores are softcap * tanh(score / softcap)
  const float* slopes;  // of each query head, times the key's distance, is added to the scores; or null
  float* out;
  HeadStrides out_at;
  float scale;
  // Query i sees keys j <= i + offset if causal and, for a window above 0, j > i + offset - window.
  bool causal;
  std::ptrdiff_t window, offset;
};

// Rows are the queries of the heads that share a key head: row = query * groups + head within the group.
struct AttentionBlock {
  std::size_t batch, key_head, row_begin, row_end, key_begin, key_end;
  float* scratch;  // of `scratch` floats, aligned to 64 bytes
  float* partial;  // null: the block has all keys. Else, for each row: greatest score, sum of weights, values
  std::size_t partial_stride;
};

// New rows of one head of a cache.
struct CacheRows {
  const float* x;
  std::ptrdiff_t x_position;
  std::size_t width;
  Rotation rotation;
  Stored stored;
  void* cache;
  std::ptrdiff_t cache_position;
  float* scales;  // null unless stored as bytes
  std::ptrdiff_t scales_position;
  float* scratch;  // [width], where something is both turned and rounded
};

// A block of rows begins at a multiple of this, so that the tiles are the same however many blocks there are.
inline constexpr std::size_t kAttentionRows = 6;
// Blocks of keys begin at a multiple of this.
inline constexpr std::size_t kAttentionKeys = 128;
// Where the values begin in a row of partial results.
inline constexpr std::size_t kPartialValues = 16;

struct AttentionKernels {
  const char* isa;
  std::size_t (*scratch)(const Attention& call, std::size_t rows);
  void (*run)(const Attention& call, const AttentionBlock& block);
  // From so many partial results of one row to the output. Overwrites the former.
  void (*combine)(float* partial, std::size_t count, std::size_t stride, std::size_t width, float* out);
  // Writes rows [begin, end).
  void (*append)(const CacheRows& rows, std::size_t begin, std::size_t end);
  // Rows lie one behind another.
  void (*softmax)(const float* x, std::size_t rows, std::size_t columns, float* y);
};

}  // namespace graphwright
