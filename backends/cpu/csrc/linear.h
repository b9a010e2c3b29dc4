// Linears on integer weights: the layout the kernels stream, and their arguments. Plain data: see kernel_table.h.
//
// Outputs are cut into panels of 64 and columns into steps: a panel's step is 256 bytes, dword n of which belongs to
// output n. With 8 bits its bytes are the codes of columns 0..3 of the step; with 4 bits byte b holds column b in its low
// and column b + 4 in its high nibble; with 2 bits it holds columns b, b + 4, b + 8 and b + 12 from the lowest bits on. A group of columns has one scale and one zero point for each output. What is
// padded (outputs to 64, columns to a whole step) has code 0, scale 0 and zero point 0, and meets activations that are 0.
#pragma once

#include <cstddef>
#include <cstdint>

#include "activation.h"

namespace graphwright {

inline constexpr std::size_t kPanel = 64;        // outputs
inline constexpr std::size_t kStepBytes = 256;   // of one panel

struct PackedLinear {
  const std::uint8_t* codes;      // [panels][groups][steps of a group][256]
  const void* scales;             // [panels][groups][64], float or half
  const std::uint8_t* zeros;      // [panels][groups][64], or null: `middle` everywhere
  const std::int32_t* sums;       // [panels * 64], of each row's codes less zero points, for shifted activations; or null
  std::size_t outputs, panels;
  std::size_t groups, group;      // columns of a group, padded to whole steps
  std::int32_t bits, middle;
  bool half_scales;
};

// Rows of activations as signed bytes: x ≈ (code - shift) * scale for every group of columns.
struct ByteRows {
  const std::int8_t* codes;       // [rows][groups * group], padded with 0
  const float* scales;            // [rows][groups of the activations], 1 or as many as the weights have
  const std::int32_t* sums;       // [rows][groups of the weights], sum of the codes
  const std::int32_t* shifts;     // [rows], or null: 0
  std::size_t rows;
  bool scale_per_group;
};

// y = activation(x Wᵀ + bias) * factor + residual; what is null is left out.
struct LinearOutput {
  float* values;                  // [rows][stride]
  std::size_t stride;
  const float* bias;              // [outputs]
  Activation activation;
  const float* factor;            // [rows][factor_stride]; a stride of 0 is one row for all
  std::size_t factor_stride;
  const float* residual;          // [rows][residual_stride], likewise
  std::size_t residual_stride;
  bool past_caches;               // store past the caches; values and rows are then aligned to 64 bytes
};

// A part of a product, the work of one thread.
struct LinearBlock {
  std::size_t panel_begin, panel_end, row_begin, row_end;
};

}  // namespace graphwright
