// What a linear does to its sums, as Python gives it.
#pragma once

#include <cstdint>
#include <string_view>

#include "bindings.h"
#include "linear.h"

namespace graphwright {

// Rows of any distance; values of a row are neighbours.
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;

inline const float* rows_of(const std::optional<Rows>& rows, const Matrix<float>& y, const char* what,
                            std::size_t& stride) {
  if (!rows) return nullptr;
  expect(rows->shape(0) == y.shape(0) && rows->shape(1) == y.shape(1), what);
  if (rows->shape(0) == 0) return nullptr;
  expect((rows->stride(1) == 1 || rows->shape(1) <= 1) && (rows->stride(0) >= 0 || rows->shape(0) <= 1), what);
  stride = static_cast<std::size_t>(rows->stride(0));
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
  output.factor = rows_of(factor, y, "factor must have y's shape, and whole rows", output.factor_stride);
  output.residual = rows_of(residual, y, "residual must have y's shape, and whole rows", output.residual_stride);
  const bool aligned = reinterpret_cast<std::uintptr_t>(y.data()) % 64 == 0 && output.stride % 16 == 0;
  output.past_caches = aligned && y.size() * sizeof(float) >= kPastCaches;
  return output;
}

}  // namespace graphwright
