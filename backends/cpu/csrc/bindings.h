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
#include <string>
#include <string_view>

#include "activation.h"

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
  if (name == "sigmoid") return Activation::kSigmoid;
  throw std::invalid_argument("no activation is called '" + std::string(name) + "'");
}

template <typename T>
const T* data_of(const std::optional<Array<const T>>& array, std::size_t size, const char* what) {
  if (!array) return nullptr;
  expect(array->shape(0) == size, what);
  return array->data();
}

void bind_attention(nb::module_& m);
void bind_byte_linear(nb::module_& m);
void bind_executor(nb::module_& m);
void bind_decoder_attention(nb::module_& m);
void bind_float_linear(nb::module_& m);
void bind_instruction(nb::module_& m);  // before those whose classes derive from it
void bind_kron_linear(nb::module_& m);
void bind_rows(nb::module_& m);
void bind_small(nb::module_& m);
void bind_sparse_linear(nb::module_& m);

}  // namespace graphwright
