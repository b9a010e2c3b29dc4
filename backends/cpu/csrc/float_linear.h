// A linear that computes in floats, as Python holds it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "float_linear_kernels.h"
#include "kernel_table.h"

namespace graphwright {

// Bytes of dense weights in the layout of float_linear_kernels.h.
std::size_t dense_bytes(std::size_t outputs, std::size_t columns, bool bfloat16);

// That layout from [outputs][columns]: float32 as it is or rounded to bfloat16, and bfloat16 (uint16) as it is.
void pack_dense(const float* stored, bool bfloat16, std::size_t outputs, std::size_t columns, std::uint8_t* values,
                std::size_t threads);
void pack_dense(const std::uint16_t* stored, std::size_t outputs, std::size_t columns, std::uint8_t* values,
                std::size_t threads);

// y = x Wᵀ + b for `rows` contiguous rows of floats. Where `bfloat16` holds they are rounded to it, and the weights are
// of that layout.
void run_dense_linear(const KernelTable& kernels, const DenseWeights& weights, bool bfloat16, const float* x,
                      std::size_t rows, const LinearOutput& y, std::size_t threads);

// The same for few outputs; weights are float32, or bfloat16 where `bfloat16` holds.
void run_narrow_linear(const KernelTable& kernels, const NarrowWeights& weights, bool bfloat16, const float* x,
                       std::size_t rows, const LinearOutput& y, std::size_t threads);

struct SparseWeights;
struct SkipWeights;

// The same for weights that are mostly zeros, float32 or bfloat16; activations are floats in both. Where `skipped` is null,
// many rows have the weights of every panel sorted for this call.
void run_sparse_linear(const KernelTable& kernels, const SparseWeights& weights, const SkipWeights* skipped, const float* x,
                       std::size_t rows, const LinearOutput& y, std::size_t threads);

// The same for codes; where `sparse` is given, for those. Where `bfloat16` holds, and the kernels multiply it by pairs, weights and activations are rounded to
// it beyond kFewRowsBfloat16 rows.
void run_coded_linear(const KernelTable& kernels, const CodedWeights& weights, bool bfloat16, const float* x,
                      std::size_t rows, const LinearOutput& y, std::size_t threads,
                      const SparseWeights* sparse = nullptr);

}  // namespace graphwright
