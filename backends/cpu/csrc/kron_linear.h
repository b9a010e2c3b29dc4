// A linear on a Kronecker product, as Python holds it.
#pragma once

#include <cstddef>

#include "kernel_table.h"
#include "kron_kernels.h"

namespace graphwright {

// factor · A X Bᵀ, X being a row as [a2][b2]. `b_first`: X Bᵀ is taken first, or A X.
struct KronWeights {
  const float* a;           // [a1][a2]
  const float* b_columns;   // [b2][b1]
  std::size_t a1, a2, b1, b2;
  float factor;
  bool b_first;

  std::size_t columns() const { return a2 * b2; }
  std::size_t outputs() const { return a1 * b1; }
  // Values between the two products, of a row.
  std::size_t between() const { return b_first ? a2 * b1 : a1 * b2; }
  std::size_t products() const { return b_first ? a2 * b2 * b1 + a1 * a2 * b1 : a1 * a2 * b2 + a1 * b2 * b1; }
};

// y = factor · x (A ⊗ B)ᵀ for `rows` contiguous rows of floats.
void run_kron_linear(const KernelTable& kernels, const KronWeights& weights, const float* x, std::size_t rows,
                     const LinearOutput& y, std::size_t threads);

}  // namespace graphwright
