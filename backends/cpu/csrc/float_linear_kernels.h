// The kernels of linears that compute in floats. Plain data: see kernel_table.h.
//
// Dense weights are cut into panels of 64 outputs like those of linear.h, and a panel into steps of 256 bytes: a column
// of float32, or two columns of bfloat16, each output's side by side. What is padded is 0.
#pragma once

#include "linear.h"

namespace graphwright {

struct DenseWeights {
  const std::uint8_t* values;  // [panels][steps][256]
  std::size_t outputs, columns;
};

// What a code stands for: an integer; a float of a table of sixteen; or the float whose eight bits it is, of four bits of
// exponent and three of mantissa, or of five and two. The kernels know no codes of infinity or NaN.
enum class Coding : std::uint8_t { kInt2, kInt4, kInt8, kTable4, kE4m3, kE5m2 };

constexpr int width_of(Coding coding) {
  if (coding == Coding::kInt2) return 2;
  return coding == Coding::kInt4 || coding == Coding::kTable4 ? 4 : 8;
}

// Codes that become floats: (code - zero point) * scale, or what the code stands for times the scale.
struct CodedWeights {
  PackedLinear packed;
  std::size_t columns, group_size;  // columns of a group as they are stored; packed.group is padded
  Coding coding;
  const float* table;               // of kTable4
};

// Few outputs, at most kNarrow, as they are stored: a panel would be read in full, padding and all.
struct NarrowWeights {
  const void* values;  // [outputs][columns], float32 or bfloat16
  std::size_t outputs, columns;
};
inline constexpr std::size_t kNarrow = 32;

struct NarrowBlock {
  std::size_t row_begin, row_end, output_begin, output_end;
};

// Rows as a kernel reads them: floats; or bfloat16, where FloatLinearKernels::pairs holds and the product is of those.
struct FloatRows {
  const void* values;
  std::size_t stride;  // in values
};

// A few rows of floats for streamed codes: every group padded with 0 to PackedLinear::group.
struct GroupedRows {
  const float* values;  // [rows][groups * group]
  const float* sums;    // [rows][groups], or null where the weights have no zero points
};

// A part of a product, the work of one thread.
struct FloatBlock {
  std::size_t panel_begin, panel_end, row_begin, row_end;
  float* sums;            // room for [kPanelsAtOnce][rows][64]
  std::uint8_t* weights;  // room for kBlockSteps * 256 bytes where codes are unpacked
};

// So many steps of a panel are multiplied with all rows before the next: 32 KiB, which stay in the first cache meanwhile.
// Sums of such blocks are added up from left to right.
inline constexpr std::size_t kBlockSteps = 128;
// Panels that take turns with many rows.
inline constexpr std::size_t kPanelsAtOnce = 4;
// Up to so many rows codes are made floats in registers, four rows at a time; with more, a block is made dense weights
// first. Products of bfloat16 need those, and are twice as fast.
inline constexpr std::size_t kFewRows = 32, kFewRowsBfloat16 = 8;

struct FloatLinearKernels {
  const char* isa;  // whose kernels these are
  bool pairs;       // whether rows for bfloat16 products are bfloat16, or floats rounded to it
  void (*float32)(const DenseWeights&, const FloatRows&, const LinearOutput&, const FloatBlock&);
  void (*bfloat16)(const DenseWeights&, const FloatRows&, const LinearOutput&, const FloatBlock&);
  void (*coded_float32)(const CodedWeights&, const FloatRows&, const LinearOutput&, const FloatBlock&);
  // Where `pairs` holds; elsewhere it would be slower than floats.
  void (*coded_bfloat16)(const CodedWeights&, const FloatRows&, const LinearOutput&, const FloatBlock&);
  void (*coded_few)(const CodedWeights&, const GroupedRows&, const LinearOutput&, const FloatBlock&);
  // Of weights that are float32 or bfloat16; activations are floats in both.
  void (*narrow_float32)(const NarrowWeights&, const float* x, const LinearOutput&, const NarrowBlock&);
  void (*narrow_bfloat16)(const NarrowWeights&, const float* x, const LinearOutput&, const NarrowBlock&);
  // A row rounded to bfloat16, to nearest, ties to even; the columns from `columns` to `padded` are 0.
  void (*round_row)(const float* x, std::size_t columns, std::size_t padded, void* rounded);
};

}  // namespace graphwright
