// Attention and softmax, for Python.
#include <limits>
#include <string_view>

#include "attention.h"
#include "bindings.h"
#include "isa.h"

namespace graphwright {
namespace {

// Of any strides; nothing is copied.
using Any = nb::ndarray<nb::ro, nb::device::cpu>;
template <typename T>
using Strided = nb::ndarray<T, nb::device::cpu>;
template <typename T>
using Whole = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

template <typename Tensor>
bool has_shape(const Tensor& tensor, std::initializer_list<std::size_t> sizes) {
  if (tensor.ndim() != sizes.size()) return false;
  std::size_t axis = 0;
  for (const std::size_t size : sizes) {
    if (tensor.shape(axis++) != size) return false;
  }
  return true;
}

template <typename Tensor>
HeadStrides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

template <typename Tensor>
bool has_whole_rows(const Tensor& tensor) {
  return tensor.size() == 0 || tensor.shape(3) == 1 || tensor.stride(3) == 1;
}

bool is_kind(const Any& tensor, nb::dlpack::dtype_code code, int bits) {
  return tensor.dtype().code == static_cast<std::uint8_t>(code) && tensor.dtype().bits == bits;
}

Stored stored_of(const Any& tensor) {
  if (is_kind(tensor, nb::dlpack::dtype_code::Float, 32)) return Stored::kFloat;
  // numpy has no bfloat16: its bits come as integers.
  if (is_kind(tensor, nb::dlpack::dtype_code::Int, 16)) return Stored::kBf16;
  if (is_kind(tensor, nb::dlpack::dtype_code::Int, 8)) return Stored::kInt8;
  throw std::invalid_argument("keys and values must be float32, int8, or int16 holding bfloat16");
}

class HeldAttention {
 public:
  HeldAttention(std::string_view isa, float scale, bool causal, std::int64_t window)
      : kernels_(*graphwright::isa(isa).kernels().attention), scale_(scale), causal_(causal) {
    // No longer than any tensor, so that sums of positions cannot overflow.
    constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max() / 4;
    window_ = static_cast<std::ptrdiff_t>(window < 0 ? 0 : (window < kMost ? window : kMost));
  }

  const char* isa() const { return kernels_.isa; }

  void run(const Strided<const float>& query, const Any& key, const Any& value, const Strided<float>& out,
           const std::optional<Strided<const bool>>& key_mask, const std::optional<Any>& bias,
           const std::optional<Strided<const float>>& key_scales, const std::optional<Strided<const float>>& value_scales,
           bool is_from_end, std::size_t threads) const {
    expect(query.ndim() == 4 && key.ndim() == 4 && value.ndim() == 4, "query, key and value must have four axes");
    const std::size_t batches = query.shape(0), heads = query.shape(1), queries = query.shape(2), width = query.shape(3);
    const std::size_t key_heads = key.shape(1), keys = key.shape(2), value_width = value.shape(3);
    expect(has_shape(key, {batches, key_heads, keys, width}), "key does not fit query");
    expect(has_shape(value, {batches, key_heads, keys, value_width}), "value does not fit key");
    expect(key_heads == 0 ? heads == 0 : heads % key_heads == 0, "query heads must be a multiple of key heads");
    expect(has_shape(out, {batches, heads, queries, value_width}), "out has the wrong shape");
    expect(has_whole_rows(query) && has_whole_rows(key) && has_whole_rows(value) && has_whole_rows(out),
           "the last axis must be contiguous");
    Attention call{};
    call.batches = batches;
    call.key_heads = key_heads;
    call.groups = key_heads == 0 ? 0 : heads / key_heads;
    call.queries = queries;
    call.keys = keys;
    call.width = width;
    call.value_width = value_width;
    call.stored = stored_of(key);
    expect(stored_of(value) == call.stored, "keys and values must be stored alike");
    static constexpr float kNothing = 0.0F;
    if (width != 0) {
      call.query = query.data();
      call.query_at = strides_of(query);
      call.key = key.data();
      call.key_at = strides_of(key);
    } else {  // no address is formed from a null pointer
      call.query = &kNothing;
      call.key = &kNothing;
    }
    call.value = value.data();
    call.value_at = strides_of(value);
    call.out = out.data();
    call.out_at = strides_of(out);
    if (call.stored == Stored::kInt8) {
      const auto fit = [&](const auto& scales) { return scales && has_shape(*scales, {batches, key_heads, keys}); };
      expect(fit(key_scales) && fit(value_scales), "bytes need scales, one for each batch, head and position");
      call.key_scales = key_scales->data();
      call.key_scales_at = strides_of(*key_scales);
      call.value_scales = value_scales->data();
      call.value_scales_at = strides_of(*value_scales);
    } else {
      expect(!key_scales && !value_scales, "only bytes have scales");
    }
    if (key_mask) {
      expect(key_mask->ndim() == 2 && (key_mask->shape(0) == batches || key_mask->shape(0) == 1) &&
                 key_mask->shape(1) == keys,
             "key_mask must be [batch or 1, keys]");
      call.key_mask = reinterpret_cast<const std::int8_t*>(key_mask->data());
      call.key_mask_batch = key_mask->shape(0) == 1 ? 0 : key_mask->stride(0);
      call.key_mask_position = key_mask->stride(1);
    }
    if (bias) set_bias(call, *bias, {batches, heads, queries, keys});
    call.scale = scale_;
    call.causal = causal_;
    call.window = window_;
    call.offset = is_from_end ? static_cast<std::ptrdiff_t>(keys) - static_cast<std::ptrdiff_t>(queries) : 0;
    nb::gil_scoped_release release;
    run_attention(kernels_, call, threads);
  }

 private:
  static void set_bias(Attention& call, const Any& bias, const std::size_t (&scores)[4]) {
    expect(bias.ndim() <= 4, "bias has more than four axes");
    const std::size_t missing = 4 - bias.ndim();
    for (std::size_t axis = missing; axis < 4; ++axis) {
      const std::size_t size = bias.shape(axis - missing);
      expect(size == 1 || size == scores[axis], "bias cannot be broadcast to the scores");
      call.bias_at[axis] = size == 1 ? 0 : bias.stride(axis - missing);
    }
    if (is_kind(bias, nb::dlpack::dtype_code::Bool, 8)) call.keep = static_cast<const std::int8_t*>(bias.data());
    else if (is_kind(bias, nb::dlpack::dtype_code::Float, 32)) call.bias = static_cast<const float*>(bias.data());
    else throw std::invalid_argument("bias must be float32 or bool");
  }

  AttentionKernels kernels_;
  float scale_;
  bool causal_;
  std::ptrdiff_t window_ = 0;
};

class HeldSoftmax {
 public:
  explicit HeldSoftmax(std::string_view isa) : kernels_(*graphwright::isa(isa).kernels().attention) {}

  const char* isa() const { return kernels_.isa; }

  void run(const Whole<const float>& x, const Whole<float>& y, std::size_t threads) const {
    expect(x.ndim() > 0 && x.ndim() == y.ndim(), "x and y must have as many axes, at least one");
    for (std::size_t axis = 0; axis < x.ndim(); ++axis) expect(x.shape(axis) == y.shape(axis), "x and y differ in shape");
    if (x.size() == 0) return;
    const std::size_t columns = x.shape(x.ndim() - 1);
    nb::gil_scoped_release release;
    run_softmax(kernels_, x.data(), x.size() / columns, columns, y.data(), threads);
  }

 private:
  AttentionKernels kernels_;
};

}  // namespace

void bind_attention(nb::module_& m) {
  nb::class_<HeldAttention>(m, "Attention", "Scaled dot-product attention.")
      .def(nb::init<std::string_view, float, bool, std::int64_t>(), "isa"_a, "scale"_a, "causal"_a, "window"_a)
      .def_prop_ro("isa", &HeldAttention::isa, "The instruction set of the kernel that runs.")
      .def("run", &HeldAttention::run, "query"_a, "key"_a, "value"_a, "out"_a.noconvert(), "key_mask"_a.none(), "bias"_a.none(),
           "key_scales"_a.none(), "value_scales"_a.none(), "is_from_end"_a, "threads"_a,
           "out = softmax(scale * query keyᵀ + masks) value.");
  nb::class_<HeldSoftmax>(m, "Softmax", "Softmax over the last axis.")
      .def(nb::init<std::string_view>(), "isa"_a)
      .def_prop_ro("isa", &HeldSoftmax::isa, "The instruction set of the kernel that runs.")
      .def("run", &HeldSoftmax::run, "x"_a, "y"_a.noconvert(), "threads"_a, "y = softmax(x).");
}

}  // namespace graphwright
