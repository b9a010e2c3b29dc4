// What the files bind_*.cpp share: the arrays that Python hands over, and one function for each family of kernels.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <cstddef>
#include <optional>
#include <stdexcept>
#include <string_view>

#include "linear.h"

namespace graphwright {

namespace nb = nanobind;
using namespace nb::literals;

template <typename T>
using Array = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Throws what Python sees as ValueError.
inline void expect(bool good, const char* what) {
  if (!good) throw std::invalid_argument(what);
}

inline Activation activation_named(std::string_view name) {
  if (name.empty()) return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "tanh") return Activation::kTanh;
  throw std::invalid_argument("there is no activation of that name");
}

template <typename T>
const T* data_of(const std::optional<Array<const T>>& array, std::size_t size, const char* what) {
  if (!array) return nullptr;
  expect(array->shape(0) == size, what);
  return array->data();
}

// Rows of floats that may lie apart.
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;

// What is done to the outputs of a linear (epilogue.inc). `factor` and `residual` have y's shape.
inline LinearOutput linear_output(const Matrix<float>& y, const float* bias, std::string_view activation,
                                  const std::optional<Rows>& factor, const std::optional<Rows>& residual) {
  LinearOutput output{};
  output.values = y.data();
  output.stride = y.shape(1);
  output.bias = bias;
  output.activation = activation_named(activation);
  for (const std::optional<Rows>* rows : {&factor, &residual}) {
    if (!*rows || y.shape(0) == 0) continue;
    expect((*rows)->shape(0) == y.shape(0) && (*rows)->shape(1) == y.shape(1), "factor and residual need y's shape");
    expect((*rows)->stride(1) == 1 || y.shape(1) < 2, "rows must be contiguous");
    expect((*rows)->stride(0) >= 0, "rows must not run backwards");
  }
  if (factor) {
    output.factor = factor->data();
    output.factor_stride = static_cast<std::size_t>(factor->stride(0));
  }
  if (residual) {
    output.residual = residual->data();
    output.residual_stride = static_cast<std::size_t>(residual->stride(0));
  }
  return output;
}

void bind_attention(nb::module_& m);
void bind_byte_linear(nb::module_& m);
void bind_rows(nb::module_& m);

}  // namespace graphwright
