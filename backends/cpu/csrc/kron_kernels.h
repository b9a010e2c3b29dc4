// The kernels of a linear on a Kronecker product. Plain data: see kernel_table.h.
#pragma once

#include "linear.h"

namespace graphwright {

// out = factor · left × right, all of them row by row.
struct SmallProduct {
  const float* left;   // [rows][inner]
  const float* right;  // [inner][columns]
  float* out;          // [rows][columns]
  std::size_t rows, inner, columns;
  float factor;
};

struct KronKernels {
  const char* isa;  // whose kernels these are
  // Every value is one chain of fused multiply-adds over `inner`, from 0 on, and then times the factor, unless that is 1.
  void (*multiply)(const SmallProduct& product);
  // What is done to `outputs` values of a row from `output` on. `values` can be read up to a multiple of kPanel.
  void (*finish)(const LinearOutput& y, const float* values, std::size_t row, std::size_t output, std::size_t outputs);
};

}  // namespace graphwright
