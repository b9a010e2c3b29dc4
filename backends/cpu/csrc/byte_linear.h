// A linear on packed integer weights, as Python holds it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "kernel_table.h"
#include "linear_kernels.h"

namespace graphwright {

// How activations become bytes.
enum class Rounding {
  kSymmetric,  // a scale for each row and group of columns, as it comes
  kShifted,    // a scale and shift for each row, as it comes
  kFixed,      // a grid that is given
};

struct ActivationGrid {
  Rounding rounding;
  const float* steps;     // kFixed: [columns]
  const float* inverses;  // kFixed: their reciprocals, or null where one is no normal number
  std::int32_t zero;      // kFixed: the code of 0, in 0..255
};

// `codes` in the layout of linear.h from codes as they are stored: [outputs][groups][group_bytes], 4-bit codes with the
// even column in the low nibble. Steps and panels that are not full are padded with 0.
void pack_codes(const std::uint8_t* stored, std::int32_t bits, std::size_t outputs, std::size_t groups,
                std::size_t group_bytes, std::uint8_t* codes, std::size_t threads);

struct SparseWeights;

// y = x Wᵀ + b for `rows` contiguous rows of `columns` floats. Where `sparse` is given, the codes are those.
void run_byte_linear(const KernelTable& kernels, const PackedLinear& weights, const ActivationGrid& grid, const float* x,
                     std::size_t rows, std::size_t columns, const LinearOutput& y, std::size_t threads,
                     const SparseWeights* sparse = nullptr);

}  // namespace graphwright
