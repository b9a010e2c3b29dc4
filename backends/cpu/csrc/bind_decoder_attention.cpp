// Attention over caches, for Python.
#include <limits>
#include <string_view>
#include <vector>

#include "bindings.h"
#include "decoder_attention.h"
#include "isa.h"

namespace graphwright {
namespace {

// Of any strides; nothing is copied.
using Any = nb::ndarray<nb::ro, nb::device::cpu>;
using Cache = nb::ndarray<nb::device::cpu>;
using Sizes = std::initializer_list<std::size_t>;

template <typename Array>
Element element_of(const Array& array) {
  using Code = nb::dlpack::dtype_code;
  const auto is = [&](Code code, int bits) {
    return array.dtype().code == static_cast<std::uint8_t>(code) && array.dtype().bits == bits;
  };
  if (is(Code::Float, 32)) return Element::kFloat;
  // numpy has no bfloat16: its bits come as integers.
  if (is(Code::Int, 16)) return Element::kBf16;
  if (is(Code::Int, 8)) return Element::kInt8;
  if (is(Code::Int, 64)) return Element::kInt64;
  throw std::invalid_argument("takes float32, int8, int64, and int16 that holds bfloat16");
}

class Operands {
 public:
  template <typename Array>
  void set(DecoderAttention::Operand place, const Array& array, Element element, Sizes sizes, const char* what) {
    Tensor& tensor = tensors_[place];
    bool fits = array.ndim() == sizes.size() && element_of(array) == element;
    std::size_t axis = 0;
    for (const std::size_t size : sizes) {
      if (!fits) break;
      fits = array.shape(axis) == size;
      tensor.shape[axis] = size;
      tensor.strides[axis] = array.stride(axis);
      ++axis;
    }
    expect(fits, what);
    tensor.data = const_cast<void*>(static_cast<const void*>(array.data()));  // inputs are only read
    tensor.element = element;
    tensor.axes = sizes.size();
  }

  // The same, where the last axis must be contiguous.
  template <typename Array>
  void set_rows(DecoderAttention::Operand place, const Array& array, Element element, Sizes sizes, const char* what) {
    set(place, array, element, sizes, what);
    const std::size_t last = array.ndim() - 1;
    expect(array.size() == 0 || array.shape(last) == 1 || array.stride(last) == 1, "the last axis must be contiguous");
  }

  const Tensor* data() const { return tensors_; }

 private:
  Tensor tensors_[DecoderAttention::kOperands]{};
};

void run(const DecoderAttention& instruction, const Any& query, const Any& key, const Any& value,
         const std::optional<Any>& cos, const std::optional<Any>& sin, const Cache& keys, const Cache& values,
         const std::optional<Cache>& key_scales, const std::optional<Cache>& value_scales, const Any& slots,
         const Any& starts, const Cache& out, std::size_t threads) {
  using Place = DecoderAttention::Operand;
  expect(query.ndim() == 4 && keys.ndim() == 4 && values.ndim() == 4, "query and caches must have four axes");
  const std::size_t batch = query.shape(0), heads = query.shape(1), length = query.shape(2), width = query.shape(3);
  const std::size_t count = keys.shape(0), key_heads = keys.shape(1), capacity = keys.shape(2);
  const std::size_t value_width = values.shape(3);
  const Element stored = element_of(keys);
  expect(key_heads == 0 ? heads == 0 : heads % key_heads == 0, "query heads must be a multiple of key heads");
  expect(stored != Element::kInt64, "caches must be float32, int8, or int16 holding bfloat16");
  Operands operands;
  operands.set_rows(Place::kQuery, query, Element::kFloat, {batch, heads, length, width}, "query must be float32");
  operands.set_rows(Place::kKey, key, Element::kFloat, {batch, key_heads, length, width}, "key does not fit");
  operands.set_rows(Place::kValue, value, Element::kFloat, {batch, key_heads, length, value_width},
                    "value does not fit");
  expect(cos.has_value() == sin.has_value(), "cos and sin belong together");
  if (cos) {
    expect(cos->ndim() == 3 && (cos->shape(0) == batch || cos->shape(0) == 1) && cos->shape(2) <= width &&
               cos->shape(2) % 2 == 0,
           "cos must be [batch or 1, length, an even number of features]");
    const Sizes sizes = {cos->shape(0), length, cos->shape(2)};
    operands.set_rows(Place::kCos, *cos, Element::kFloat, sizes, "cos does not fit");
    operands.set_rows(Place::kSin, *sin, Element::kFloat, sizes, "sin does not fit cos");
  }
  operands.set_rows(Place::kKeys, keys, stored, {count, key_heads, capacity, width}, "keys do not fit");
  operands.set_rows(Place::kValues, values, stored, {count, key_heads, capacity, value_width}, "values do not fit keys");
  if (stored == Element::kInt8) {
    expect(key_scales && value_scales, "bytes need scales");
    operands.set(Place::kKeyScales, *key_scales, Element::kFloat, {count, key_heads, capacity}, "scales do not fit keys");
    operands.set(Place::kValueScales, *value_scales, Element::kFloat, {count, key_heads, capacity},
                 "scales do not fit values");
  } else {
    expect(!key_scales && !value_scales, "only bytes have scales");
  }
  operands.set(Place::kSlots, slots, Element::kInt64, {batch}, "slots must be int64 [batch]");
  operands.set(Place::kStarts, starts, Element::kInt64, {batch}, "starts must be int64 [batch]");
  operands.set_rows(Place::kOutput, out, Element::kFloat, {batch, heads, length, value_width}, "out does not fit");
  nb::gil_scoped_release release;
  instruction.run(operands.data(), threads);
}

}  // namespace

void bind_decoder_attention(nb::module_& m) {
  nb::class_<DecoderAttention, Instruction>(m, "DecoderAttention", "One decoding step of attention, caches included.")
      .def(
          "__init__",
          [](DecoderAttention* self, std::string_view isa, float scale, std::int64_t window, float softcap,
             const std::optional<Array<const float>>& slopes, bool interleaved) {
            // No longer than any cache, so that sums of positions cannot overflow.
            constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max() / 4;
            expect(window >= 0 && softcap >= 0.0F, "window and softcap must not be negative");
            std::vector<float> each;
            if (slopes) each.assign(slopes->data(), slopes->data() + slopes->shape(0));
            new (self) DecoderAttention(*graphwright::isa(isa).kernels().attention, scale,
                                        static_cast<std::ptrdiff_t>(window < kMost ? window : kMost), softcap,
                                        std::move(each), interleaved);
          },
          "isa"_a, "scale"_a, "window"_a, "softcap"_a, "slopes"_a.none(), "interleaved"_a)
      .def_prop_ro("isa", &DecoderAttention::isa, "The instruction set of the kernel that runs.")
      .def("run", &run, "query"_a, "key"_a, "value"_a, "cos"_a.none(), "sin"_a.none(), "keys"_a.noconvert(),
           "values"_a.noconvert(), "key_scales"_a.none().noconvert(), "value_scales"_a.none().noconvert(), "slots"_a,
           "starts"_a, "out"_a.noconvert(), "threads"_a, "Writes key and value into the caches, and attends.");
}

}  // namespace graphwright
