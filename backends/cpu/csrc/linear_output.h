// What a linear does to its sums, as Python gives it.
#pragma once

#include <cstdint>
#include <string_view>

#include "bindings.h"
#include "instruction.h"
#include "linear.h"

namespace graphwright {

// Rows of any distance; values of a row are neighbours. One row may serve all.
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;

inline const float* rows_of(const std::optional<Rows>& rows, const Matrix<float>& y, const char* what,
                            std::size_t& stride) {
  if (!rows) return nullptr;
  expect((rows->shape(0) == y.shape(0) || rows->shape(0) == 1) && rows->shape(1) == y.shape(1), what);
  if (y.shape(0) == 0) return nullptr;
  expect((rows->stride(1) == 1 || rows->shape(1) <= 1) && (rows->stride(0) >= 0 || rows->shape(0) <= 1), what);
  stride = rows->shape(0) == 1 ? 0 : static_cast<std::size_t>(rows->stride(0));
  return rows->data();
}

// Results of so many bytes do not stay in a core's own caches until they are read.
inline constexpr std::size_t kPastCaches = std::size_t{4} << 20;

inline LinearOutput output_of(const Matrix<float>& y, const float* bias, std::string_view activation,
                              const std::optional<Rows>& factor, const std::optional<Rows>& residual) {
  LinearOutput output{};
  output.values = y.data();
  output.stride = y.shape(1);
  output.bias = bias;
  output.activation = activation_named(activation);
  output.factor = rows_of(factor, y, "factor must have y's shape or be one row of it, and whole rows", output.factor_stride);
  output.residual = rows_of(residual, y, "residual must have y's shape or be one row of it, and whole rows", output.residual_stride);
  const bool aligned = reinterpret_cast<std::uintptr_t>(y.data()) % 64 == 0 && output.stride % 16 == 0;
  output.past_caches = aligned && y.size() * sizeof(float) >= kPastCaches;
  return output;
}

// Of rows, or 0 where there is one for all.
inline std::size_t stride_of(const Tensor& rows) {
  return rows.data == nullptr || rows.rows() == 1 ? 0 : static_cast<std::size_t>(rows.row_stride());
}

// The same for operands of an instruction: x, factor, residual, y.
inline LinearOutput output_of(const Tensor* operands, const float* bias, Activation activation) {
  const Tensor &factor = operands[1], &residual = operands[2], &y = operands[3];
  LinearOutput output{};
  output.values = y.as<float>();
  output.stride = y.columns();
  output.bias = bias;
  output.activation = activation;
  output.factor = factor.as<const float>();
  output.factor_stride = stride_of(factor);
  output.residual = residual.as<const float>();
  output.residual_stride = stride_of(residual);
  output.past_caches = output.stride % 16 == 0 && y.size() * sizeof(float) >= kPastCaches;
  return output;
}

// What linears have in common as instructions. Operands: x `[..., in]`, factor and residual `[..., out]`, `[out]` or absent,
// y `[..., out]`; float32.
class LinearInstruction : public Instruction {
 public:
  Layout layout(std::size_t operand) const override { return operand == 0 ? Layout::kContiguous : Layout::kRows; }
  void set_activation(std::string_view name) { activation_ = activation_named(name); }

 protected:
  Activation activation_ = Activation::kNone;  // of the instruction; Python's calls name their own
};

inline constexpr const char* kActivationDoc = "What the executor applies to the product: a name, or empty.";

}  // namespace graphwright
