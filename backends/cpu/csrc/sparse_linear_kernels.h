// The kernels of linears whose weights are mostly zeros. Plain data: see kernel_table.h.
//
// A weight is stored as the dense one would be (linear.h, float_linear_kernels.h), panels of 64 outputs and steps in them,
// but of each step only a mask and the values that are not zero, one after another in the order of the dense layout. A
// kernel makes dense weights of them, in registers or in a cache, and multiplies those: sums are the dense kernels', to the
// last bit.
//
// With codes a step is four columns, 256 codes, and has four words of 64 bits, a bit for each code. 4-bit codes become bytes
// in it; those of two words share bytes, the first's in the low halves and the second's in the high ones, as many bytes as
// the fuller of them needs: to part them takes half the instructions that neighbours would. With floats a step is one column
// and has one word, a bit for each output.
#pragma once

#include "float_linear_kernels.h"
#include "linear.h"
#include "linear_kernels.h"

namespace graphwright {

enum class SparseValues : std::uint8_t { kFloat32, kBfloat16, kInt8, kInt4 };

// Values of so many steps have an offset of their own.
inline constexpr std::size_t kSparseSteps = kBlockSteps;
// A kernel may read so many bytes beyond the last value.
inline constexpr std::size_t kSparseBeyond = 64;

// Columns that a slot of gathered weights reaches.
inline constexpr std::size_t kWindow = 64;

// Of each output of a panel up to four weights whose columns lie in one window: of output n bytes 4n..4n + 3.
struct alignas(64) GatheredSlot {
  std::uint8_t places[kStepBytes];  // of their columns in the window
  std::int8_t codes[kStepBytes];    // less the zero point; 0 where there is none
};

// Weights of one group for many rows: of every output its own columns are picked out of a row, four for each product, so
// that all zeros are skipped. Windows of a panel follow each other from left to right, wherever the output that is behind
// all others needs one, and the others take from it what they have in it; 4096 columns of which 20 % are not zeros need 243
// slots, where 205 would do if all outputs had theirs alike, and the dense weights have 1024 steps.
struct GatheredWeights {
  const GatheredSlot* slots;
  const std::uint32_t* windows;  // [slots]: the first column of each
  const std::uint64_t* offsets;  // [panels + 1]: where each panel's begin
};

// Steps of four columns whose blocks are multiplied together: those of the turned rows stay in the first cache meanwhile.
inline constexpr std::size_t kBlockedSteps = 96;

// The blocks of a panel's outputs in kBlockedSteps steps, output by output. Those with as many blocks follow each other, as
// in a SkipChunk.
struct BlockedChunk {
  std::uint64_t begin;               // of the chunk's blocks among the panel's
  std::uint16_t starts[kPanel + 1];  // of each output's blocks, from `begin` on
  std::uint8_t outputs[kPanel];      // whose they are
};

// Weights of one group for many rows, in blocks of four columns that lie in one step and of which at least one is stored:
// a panel's chunks, from left to right, and its blocks.
struct BlockedPanel {
  const BlockedChunk* chunks;
  const std::int32_t* codes;   // four to a block, less the zero point
  const std::uint8_t* places;  // of their steps in the chunk
};

// Columns whose weights are multiplied together where zeros of floats are skipped: those of the turned input stay in the
// first cache meanwhile.
inline constexpr std::size_t kSkipColumns = kSparseSteps / 2;

// The weights of a panel's outputs in kSkipColumns columns, output by output. Those with as many weights follow each other:
// loops over them end where the one before did, which a processor foresees.
struct alignas(64) SkipChunk {
  std::uint64_t masks[kPanel];   // bit k: there is a weight in column k
  std::uint16_t starts[kPanel];  // of each output's weights, from `begin` on
  std::uint8_t outputs[kPanel];  // whose they are
  std::uint32_t begin;           // of the chunk's weights among the panel's
};

// Floats for many rows: a panel's chunks, from left to right, and its weights.
struct SkipPanel {
  const SkipChunk* chunks;
  const float* weights;
};

struct SparseWeights {
  const std::uint64_t* masks;    // [panels][steps][words of a step]
  const std::uint8_t* values;
  const std::uint64_t* offsets;  // [panels][blocks of kSparseSteps], in bytes; and where the last one ends
  std::size_t outputs, panels, steps;
  SparseValues kind;
  const GatheredWeights* gathered;  // of codes, for many rows; or null
  const BlockedPanel* blocked;      // [panels], instead of gathered ones; or null

  std::size_t blocks() const { return (steps + kSparseSteps - 1) / kSparseSteps; }
  std::size_t words() const { return kind == SparseValues::kInt8 || kind == SparseValues::kInt4 ? 4 : 1; }
};

// A part of a panel: `begin` is a multiple of kSparseSteps.
struct SparsePart {
  std::size_t panel, begin, end;
};

// What a code is where none is stored.
struct SparseFill {
  const std::uint8_t* zeros;  // of the panel's groups, [groups][64], or null: `middle` everywhere
  std::size_t group_steps;    // of a group
  std::uint8_t middle;
  std::uint8_t raise;         // added to every code, zero points too
};

// Rows of codes with 128 added to each. A window of any row's columns can be read whole.
struct RaisedRows {
  const std::uint8_t* codes;  // [rows][stride]
  std::size_t stride;
};

// A tile of rows of codes with 128 added to each, step by step: [steps][width][4 columns].
struct TurnedCodes {
  const std::uint8_t* codes;
  std::size_t row, rows, width;  // its first row, how many it has, and how many it is padded to
};

// Which panel that is, and of how many outputs and columns, or steps of four.
struct SkipPlace {
  std::size_t panel, outputs, columns;
};

struct SparseByteKernels {
  const char* isa;
  // Writes codes, 256 bytes a step.
  void (*expand)(const SparseWeights&, const SparsePart&, const SparseFill&, std::uint8_t* codes);
  // Up to `few_rows` rows with codes that are expanded in registers; null where they are not.
  void (*few)(const SparseWeights&, const PackedLinear&, const ByteRows&, const LinearOutput&, const LinearBlock&);
  std::size_t few_rows;
  // More rows, on weights that have been gathered; the linear has one group, no zero points, and its `sums`. Null where
  // there is none.
  void (*gathered)(const GatheredWeights&, const PackedLinear&, const ByteRows&, const RaisedRows&, const LinearOutput&,
                   const LinearBlock&);
  // The same on blocks, for a panel and a tile of at most `blocked_rows` rows, whose width is a multiple of `lanes`. Scratch:
  // [2][64][width].
  void (*blocked)(const BlockedPanel&, const PackedLinear&, const ByteRows&, const TurnedCodes&, const LinearOutput&,
                  const SkipPlace&, std::int32_t* scratch);
  void (*turn)(const std::int8_t* codes, std::size_t rows, std::size_t steps, std::size_t width, std::uint8_t* to);
  std::size_t lanes, blocked_rows;
};

// Rows of floats, in tiles of `height` rows, each of them column by column; what is padded to `width` rows is 0.
struct TurnedRows {
  const float* values;  // [tiles][columns][width]
  std::size_t rows, height, width, tiles;
};

struct SparseFloatKernels {
  const char* isa;
  // As FloatLinearKernels::float32.
  void (*run)(const SparseWeights&, const FloatRows&, const LinearOutput&, const FloatBlock&);
  // Many rows, all of them finite: all rows of a panel, zeros being skipped. Scratch: [2][tiles][64][width].
  void (*skip)(const SkipPanel&, const TurnedRows&, const LinearOutput&, const SkipPlace&, float* scratch);
  // Turns a tile of rows; whether all of them are finite.
  bool (*turn)(const float* x, std::size_t stride, std::size_t rows, std::size_t columns, std::size_t width, float* to);
  std::size_t lanes, most_rows;  // a tile's width is a multiple of the one, and the other at most
};

}  // namespace graphwright
