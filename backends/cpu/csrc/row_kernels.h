// The kernels that work row by row, or value by value, as an instruction set offers them. Plain data: see kernel_table.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "activation.h"

namespace graphwright {

// Rows of contiguous values; row i begins at data + i * stride.
struct InputRows {
  const float* data;
  std::ptrdiff_t stride;
};
struct OutputRows {
  float* data;
  std::ptrdiff_t stride;
};

// s = x + residual, y = norm(s) * weight + bias. What is null is left out.
struct Norm {
  InputRows x, residual;
  OutputRows sum;       // takes s; needed where there is a residual
  OutputRows y;
  const float* weight;  // [columns]
  const float* bias;    // [columns]
  std::size_t columns;
  float epsilon;
};

// What becomes of two values; kSlope: the first, times the second unless it is above 0 (a leaky ReLU).
enum class Combine : std::uint8_t { kMultiply, kAdd, kSubtract, kSlope };

// y = activation(x) * other, or combined otherwise. Without `other` it is left out.
struct Pointwise {
  InputRows x, other;
  OutputRows y;
  std::size_t columns;
  Activation activation;
  Combine combine;
  bool one;  // `other` is a single number
  std::size_t shared;  // consecutive rows of x that share one number of `other`; 0: `other` has a number for each column
};

// y = x * cos + turned(x) * sin in the first `rotated` features, x in those that follow.
struct Rotary {
  const float* x;           // [batch][heads][positions][width], features contiguous
  const float* cos;         // [batch][positions][rotated], features contiguous
  const float* sin;         // the same
  float* y;                 // like x, contiguous
  std::size_t heads, positions, width, rotated;
  std::ptrdiff_t x_batch, x_head, x_position, cos_batch, cos_position, sin_batch, sin_position;
  bool interleaved;         // pairs are neighbours, not halves
};

// A row of an integer table: (code - zero) * scale. 4-bit codes have the even column in the low nibble.
struct PackedRow {
  const std::uint8_t* codes;  // [groups][group * bits / 8]
  const float* scales;        // [groups]
  const std::uint8_t* zeros;  // [groups], or null: the middle code
  std::size_t columns, group;
  std::int32_t bits;
};

struct RowKernels {
  const char* isa;  // whose kernels these are: an instruction set that has none takes its parent's
  // Rows `begin` to `end`.
  void (*layer_norm)(const Norm& norm, std::size_t begin, std::size_t end);
  void (*rms_norm)(const Norm& norm, std::size_t begin, std::size_t end);
  void (*pointwise)(const Pointwise& work, std::size_t begin, std::size_t end);
  // A row is one position of one head of one sequence, in the order of y.
  void (*rotary)(const Rotary& work, std::size_t begin, std::size_t end);
  void (*unpack_row)(const PackedRow& row, float* y);
};

}  // namespace graphwright
