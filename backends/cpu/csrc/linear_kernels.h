// The kernels of linears on bytes that an instruction set may offer. Plain data: see kernel_table.h.
#pragma once

#include "linear.h"

namespace graphwright {

// Rows of floats: `columns` of each are read and `padded` codes written, in groups.
struct RowShape {
  std::size_t rows, columns, stride, padded, group;
};

// Memory of this thread for so many codes widened to 16 bits; what it held is lost. Here, because a kernel's own file must
// not hold code of the standard library, which would be compiled for its instruction set and serve others.
std::int16_t* memory_of_wide_rows(std::size_t count);

struct ByteLinear {
  const char* isa;  // whose kernel this is: an instruction set that has none takes its parent's
  // Writes the outputs of a block.
  void (*run)(const PackedLinear& weights, const ByteRows& rows, const LinearOutput& output, const LinearBlock& block);
};

struct ByteRowsKernels {
  // One scale for every group: x ≈ code * scale. Scales and sums are [rows][groups]. A group with NaN or infinity gets
  // the scale NaN.
  void (*symmetric)(const float* x, const RowShape& shape, std::int8_t* codes, float* scales, std::int32_t* sums);
  // One scale and shift for every row, from its least and greatest value and 0: x ≈ (code - shift) * scale.
  void (*shifted)(const float* x, const RowShape& shape, std::int8_t* codes, float* scales, std::int32_t* shifts,
                  std::int32_t* sums);
  // A grid given beforehand: code = nearest(x / steps[column]) + zero - 128, clipped. Scales are 1, or NaN for a row
  // that holds NaN. `inverses` are the steps' reciprocals, or null where one is no normal number.
  void (*fixed)(const float* x, const RowShape& shape, const float* steps, const float* inverses, std::int32_t zero,
                std::int8_t* codes, float* scales, std::int32_t* sums);
};

}  // namespace graphwright
