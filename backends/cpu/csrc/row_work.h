// Row by row work, cut into pieces for threads. The results do not depend on how many there are.
#pragma once

#include <cstddef>
#include <cstdint>

#include "row_kernels.h"

namespace graphwright {

void run_norm(void (*kernel)(const Norm&, std::size_t, std::size_t), const Norm& norm, std::size_t rows,
              std::size_t threads);

void run_pointwise(const RowKernels& kernels, Pointwise work, std::size_t rows, std::size_t threads);

void run_rotary(const RowKernels& kernels, const Rotary& work, std::size_t batch, std::size_t threads);

// What a lookup found wrong: the place of the first index that is not in the table.
inline constexpr std::size_t kAllFound = SIZE_MAX;

// Copies rows of `bytes` bytes; one whose index is not in the table is left as it is.
std::size_t copy_rows(const std::uint8_t* table, std::size_t table_rows, std::size_t bytes, const std::int64_t* indices,
                      std::size_t count, std::uint8_t* y, std::size_t threads);

// A table of PackedRows, one after another.
struct PackedTable {
  PackedRow first;
  std::size_t rows, groups;
};

std::size_t unpack_rows(const RowKernels& kernels, const PackedTable& table, const std::int64_t* indices,
                        std::size_t count, float* y, std::size_t threads);

}  // namespace graphwright
