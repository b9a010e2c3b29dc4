// Norms, activations, rotary embeddings and lookups in tables, for Python.
#include <cstring>
#include <string>
#include <string_view>

#include "bindings.h"
#include "instruction.h"
#include "isa.h"
#include "row_work.h"

namespace graphwright {
namespace {

// Of any strides but the last dimension's: that is contiguous.
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using Rows3 = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;
using Rows4 = nb::ndarray<const float, nb::ndim<4>, nb::device::cpu>;
using Result = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;
using Result4 = nb::ndarray<float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

template <typename Array>
bool features_contiguous(const Array& x) {
  const std::size_t last = x.ndim() - 1;
  return x.size() == 0 || x.shape(last) == 1 || x.stride(last) == 1;
}

template <typename Array>
void expect_rows(const Array& x, std::size_t rows, std::size_t columns) {
  expect(x.shape(0) == rows && x.shape(1) == columns, "the arrays differ in shape");
  expect(features_contiguous(x), "the last dimension must be contiguous");
}

InputRows input_rows(const Rows& x, std::size_t rows, std::size_t columns) {
  expect_rows(x, rows, columns);
  return {x.data(), static_cast<std::ptrdiff_t>(x.stride(0))};
}

OutputRows output_rows(const Result& y, std::size_t rows, std::size_t columns) {
  expect_rows(y, rows, columns);
  expect(rows < 2 || y.size() == 0 || y.stride(0) >= static_cast<std::int64_t>(columns), "rows of the result overlap");
  return {y.data(), static_cast<std::ptrdiff_t>(y.stride(0))};
}

InputRows input_rows(const Tensor& x) {
  if (x.data == nullptr) return {};
  return {x.as<const float>(), x.row_stride()};
}

OutputRows output_rows(const Tensor& y) {
  if (y.data == nullptr) return {};
  return {y.as<float>(), y.row_stride()};
}

// Operands of the instruction: x, residual or absent, y, their sum or absent.
class HeldNorm : public Instruction {
 public:
  HeldNorm(std::string_view isa, bool centred, std::optional<Array<const float>> weight,
           std::optional<Array<const float>> bias, float epsilon)
      : kernels_(*graphwright::isa(isa).kernels().rows), centred_(centred), weight_(std::move(weight)),
        bias_(std::move(bias)), epsilon_(epsilon) {}

  const char* isa() const { return kernels_.isa; }

  void run(const Rows& x, const std::optional<Rows>& residual, const Result& y, const std::optional<Result>& sum,
           std::size_t threads) const {
    const std::size_t rows = x.shape(0), columns = x.shape(1);
    Norm norm{};
    norm.x = input_rows(x, rows, columns);
    norm.y = output_rows(y, rows, columns);
    expect(residual.has_value() == sum.has_value(), "a residual and its sum belong together");
    if (residual) norm.residual = input_rows(*residual, rows, columns);
    if (sum) norm.sum = output_rows(*sum, rows, columns);
    norm.weight = data_of(weight_, columns, "weight has the wrong size");
    norm.bias = data_of(bias_, columns, "bias has the wrong size");
    norm.columns = columns;
    norm.epsilon = epsilon_;
    if (x.size() == 0) return;
    nb::gil_scoped_release release;
    run_norm(centred_ ? kernels_.layer_norm : kernels_.rms_norm, norm, rows, threads);
  }

  Layout layout(std::size_t) const override { return Layout::kRows; }

  void run(const Tensor* operands, std::size_t threads) const override {
    Norm norm{};
    norm.x = input_rows(operands[0]);
    norm.residual = input_rows(operands[1]);
    norm.y = output_rows(operands[2]);
    norm.sum = output_rows(operands[3]);
    norm.weight = weight_ ? weight_->data() : nullptr;
    norm.bias = bias_ ? bias_->data() : nullptr;
    norm.columns = operands[0].columns();
    norm.epsilon = epsilon_;
    if (operands[0].size() == 0) return;
    run_norm(centred_ ? kernels_.layer_norm : kernels_.rms_norm, norm, operands[0].rows(), threads);
  }

 private:
  RowKernels kernels_;
  bool centred_;
  std::optional<Array<const float>> weight_, bias_;
  float epsilon_;
};

Combine combine_named(std::string_view name) {
  if (name == "multiply") return Combine::kMultiply;
  if (name == "add") return Combine::kAdd;
  if (name == "subtract") return Combine::kSubtract;
  if (name == "slope") return Combine::kSlope;
  throw std::invalid_argument("two values cannot be combined by '" + std::string(name) + "'");
}

// Operands of the instruction: x, other (of x's shape, one row, one number, or one number for each of its first axis) or
// absent, y. With a number it is the other.
class HeldPointwise : public Instruction {
 public:
  HeldPointwise(std::string_view isa, std::string_view activation, std::string_view combine, std::optional<float> number)
      : kernels_(*graphwright::isa(isa).kernels().rows), activation_(activation_named(activation)),
        combine_(combine_named(combine)), number_(number) {}

  const char* isa() const { return kernels_.isa; }

  void run(const Rows& x, const std::optional<Rows>& other, const Result& y, std::size_t threads) const {
    const std::size_t rows = x.shape(0), columns = x.shape(1);
    Pointwise work{};
    work.x = input_rows(x, rows, columns);
    expect(!other || !number_, "the other value is a number");
    if (other) work.other = input_rows(*other, rows, columns);
    work.y = output_rows(y, rows, columns);
    work.columns = columns;
    set(work);
    if (x.size() == 0) return;
    nb::gil_scoped_release release;
    run_pointwise(kernels_, work, rows, threads);
  }

  Layout layout(std::size_t) const override { return Layout::kRows; }

  void run(const Tensor* operands, std::size_t threads) const override {
    const Tensor &x = operands[0], &other = operands[1];
    Pointwise work{};
    work.x = input_rows(x);
    work.other = input_rows(other);
    if (other.data != nullptr && other.rows() == 1) work.other.stride = 0;
    work.one = other.data != nullptr && other.size() == 1;
    if (other.data != nullptr && !work.one && other.rows() > 1 && other.columns() == 1) {
      expect(x.rows() % other.rows() == 0, "numbers for the first axis do not fit the rows");
      work.shared = x.rows() / other.rows();
    }
    work.y = output_rows(operands[2]);
    work.columns = x.columns();
    set(work);
    if (x.size() == 0) return;
    run_pointwise(kernels_, work, x.rows(), threads);
  }

 private:
  void set(Pointwise& work) const {
    work.activation = activation_;
    work.combine = combine_;
    if (!number_) return;
    work.other = {&*number_, 0};
    work.one = true;
  }

  RowKernels kernels_;
  Activation activation_;
  Combine combine_;
  std::optional<float> number_;
};

// Operands of the instruction: x [B, H, S, D], cos and sin [B or 1, S, R], y like x and contiguous.
class HeldRotary : public Instruction {
 public:
  HeldRotary(std::string_view isa, bool interleaved)
      : kernels_(*graphwright::isa(isa).kernels().rows), interleaved_(interleaved) {}

  const char* isa() const { return kernels_.isa; }

  void run(const Rows4& x, const Rows3& cos, const Rows3& sin, const Result4& y, std::size_t threads) const {
    Rotary work{};
    const std::size_t batch = x.shape(0);
    work.heads = x.shape(1);
    work.positions = x.shape(2);
    work.width = x.shape(3);
    work.rotated = cos.shape(2);
    for (std::size_t axis = 0; axis < 4; ++axis) expect(y.shape(axis) == x.shape(axis), "y has the wrong shape");
    for (const Rows3* angle : {&cos, &sin}) {
      expect(angle->shape(0) == batch || angle->shape(0) == 1, "cos and sin have the wrong batch size");
      expect(angle->shape(1) == work.positions && angle->shape(2) == work.rotated, "cos and sin have the wrong shape");
      expect(features_contiguous(*angle), "the last dimension must be contiguous");
    }
    expect(work.rotated <= work.width && work.rotated % 2 == 0, "so many features cannot be rotated");
    expect(features_contiguous(x), "the last dimension must be contiguous");
    if (x.size() == 0) return;
    work.x = x.data();
    work.cos = cos.data();
    work.sin = sin.data();
    work.y = y.data();
    work.x_batch = x.stride(0);
    work.x_head = x.stride(1);
    work.x_position = x.stride(2);
    work.cos_batch = cos.shape(0) == 1 ? 0 : cos.stride(0);
    work.cos_position = cos.stride(1);
    work.sin_batch = sin.shape(0) == 1 ? 0 : sin.stride(0);
    work.sin_position = sin.stride(1);
    work.interleaved = interleaved_;
    nb::gil_scoped_release release;
    run_rotary(kernels_, work, batch, threads);
  }

  void run(const Tensor* operands, std::size_t threads) const override {
    const Tensor &x = operands[0], &cos = operands[1], &sin = operands[2];
    if (x.size() == 0) return;
    Rotary work{};
    work.heads = x.shape[1];
    work.positions = x.shape[2];
    work.width = x.shape[3];
    work.rotated = cos.shape[2];
    work.x = x.as<const float>();
    work.cos = cos.as<const float>();
    work.sin = sin.as<const float>();
    work.y = operands[3].as<float>();
    work.x_batch = x.strides[0];
    work.x_head = x.strides[1];
    work.x_position = x.strides[2];
    work.cos_batch = cos.shape[0] == 1 ? 0 : cos.strides[0];
    work.cos_position = cos.strides[1];
    work.sin_batch = sin.shape[0] == 1 ? 0 : sin.strides[0];
    work.sin_position = sin.strides[1];
    work.interleaved = interleaved_;
    run_rotary(kernels_, work, x.shape[0], threads);
  }

 private:
  RowKernels kernels_;
  bool interleaved_;
};

void expect_found(std::size_t wrong, const Array<const std::int64_t>& indices, std::size_t rows) {
  if (wrong == kAllFound) return;
  const std::string message = "index " + std::to_string(indices.data()[wrong]) + " is not in a table of " +
                              std::to_string(rows) + " rows";
  throw nb::index_error(message.c_str());
}

// Where an instruction's index is not in a table.
void expect_found(std::size_t wrong, const Tensor& indices, std::size_t rows) {
  if (wrong == kAllFound) return;
  throw std::invalid_argument("index " + std::to_string(indices.as<const std::int64_t>()[wrong]) +
                              " is not in a table of " + std::to_string(rows) + " rows");
}

// Operands of the instruction: indices int64, y `[..., columns]` float32. Rows hold float32, or bfloat16 where `bfloat16`
// holds: that matters to the instruction only.
class HeldTable : public Instruction {
 public:
  HeldTable(Matrix<const std::uint8_t> table, bool bfloat16) : table_(std::move(table)), bfloat16_(bfloat16) {}

  Layout layout(std::size_t) const override { return Layout::kContiguous; }

  void run(const Tensor* operands, std::size_t threads) const override {
    const Tensor& indices = operands[0];
    const std::size_t bytes = table_.shape(1);
    auto* y = operands[1].as<float>();
    const auto* places = indices.as<const std::int64_t>();
    if (!bfloat16_) {
      const std::size_t wrong = copy_rows(table_.data(), table_.shape(0), bytes, places, indices.size(),
                                          reinterpret_cast<std::uint8_t*>(y), threads);
      return expect_found(wrong, indices, table_.shape(0));
    }
    for (std::size_t place = 0; place < indices.size(); ++place) {
      const std::int64_t index = places[place];
      if (index < 0 || static_cast<std::uint64_t>(index) >= table_.shape(0)) expect_found(place, indices, table_.shape(0));
      const std::uint8_t* row = table_.data() + static_cast<std::size_t>(index) * bytes;
      for (std::size_t i = 0; i < bytes / 2; ++i) {
        std::uint16_t half;
        std::memcpy(&half, row + 2 * i, 2);
        const std::uint32_t whole = static_cast<std::uint32_t>(half) << 16U;
        std::memcpy(y + place * (bytes / 2) + i, &whole, 4);
      }
    }
  }

  void run(const Array<const std::int64_t>& indices, const Matrix<std::uint8_t>& y, std::size_t threads) const {
    const std::size_t count = indices.shape(0), bytes = table_.shape(1);
    expect(y.shape(0) == count && y.shape(1) == bytes, "y has the wrong shape");
    std::size_t wrong = kAllFound;
    {
      nb::gil_scoped_release release;
      wrong = copy_rows(table_.data(), table_.shape(0), bytes, indices.data(), count, y.data(), threads);
    }
    expect_found(wrong, indices, table_.shape(0));
  }

 private:
  Matrix<const std::uint8_t> table_;
  bool bfloat16_;
};

// Operands of the instruction: indices int64, y `[..., columns]` float32.
class HeldPackedTable : public Instruction {
 public:
  HeldPackedTable(std::string_view isa, int bits, std::size_t columns, std::size_t group,
                  nb::ndarray<const std::uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu> codes,
                  Matrix<const float> scales, std::optional<Matrix<const std::uint8_t>> zeros)
      : kernels_(*graphwright::isa(isa).kernels().rows), codes_(std::move(codes)), scales_(std::move(scales)),
        zeros_(std::move(zeros)) {
    expect(bits == 4 || bits == 8, "bits must be 4 or 8");
    expect(group > 0 && (bits == 8 || group % 2 == 0), "a group must be whole bytes");
    const std::size_t rows = codes_.shape(0), groups = (columns + group - 1) / group;
    expect(codes_.shape(1) == groups && codes_.shape(2) == group * static_cast<std::size_t>(bits) / 8,
           "codes has the wrong size");
    expect(scales_.shape(0) == rows && scales_.shape(1) == groups, "scales has the wrong size");
    if (zeros_) expect(zeros_->shape(0) == rows && zeros_->shape(1) == groups, "zeros has the wrong size");
    table_ = {{codes_.data(), scales_.data(), zeros_ ? zeros_->data() : nullptr, columns, group, bits}, rows, groups};
  }

  const char* isa() const { return kernels_.isa; }

  void run(const Array<const std::int64_t>& indices, const Matrix<float>& y, std::size_t threads) const {
    expect(y.shape(0) == indices.shape(0) && y.shape(1) == table_.first.columns, "y has the wrong shape");
    std::size_t wrong = kAllFound;
    {
      nb::gil_scoped_release release;
      wrong = unpack_rows(kernels_, table_, indices.data(), indices.shape(0), y.data(), threads);
    }
    expect_found(wrong, indices, table_.rows);
  }

  Layout layout(std::size_t) const override { return Layout::kContiguous; }

  void run(const Tensor* operands, std::size_t threads) const override {
    const Tensor& indices = operands[0];
    const std::size_t wrong = unpack_rows(kernels_, table_, indices.as<const std::int64_t>(), indices.size(),
                                          operands[1].as<float>(), threads);
    expect_found(wrong, indices, table_.rows);
  }

 private:
  RowKernels kernels_;
  nb::ndarray<const std::uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu> codes_;
  Matrix<const float> scales_;
  std::optional<Matrix<const std::uint8_t>> zeros_;
  PackedTable table_{};
};

constexpr const char* kIsa = "The instruction set of the kernel that runs.";

}  // namespace

void bind_rows(nb::module_& m) {
  // Results take no conversion: a converted one would be a copy, and what is written to it lost.
  nb::class_<HeldNorm, Instruction>(m, "Norm", "Layer or root-mean-square normalisation of rows.")
      .def(nb::init<std::string_view, bool, std::optional<Array<const float>>, std::optional<Array<const float>>, float>(),
           "isa"_a, "centred"_a, "weight"_a.none(), "bias"_a.none(), "epsilon"_a)
      .def_prop_ro("isa", &HeldNorm::isa, kIsa)
      .def("run",
           nb::overload_cast<const Rows&, const std::optional<Rows>&, const Result&, const std::optional<Result>&, std::size_t>(&HeldNorm::run, nb::const_), "x"_a.noconvert(), "residual"_a.noconvert().none(), "y"_a.noconvert(),
           "sum"_a.noconvert().none(), "threads"_a, "y = norm(x + residual), sum = x + residual.");
  nb::class_<HeldPointwise, Instruction>(m, "Pointwise", "An activation, a sum, a difference, a product or a slope, value by value.")
      .def(nb::init<std::string_view, std::string_view, std::string_view, std::optional<float>>(), "isa"_a, "activation"_a,
           "combine"_a = "multiply", "number"_a = nb::none())
      .def_prop_ro("isa", &HeldPointwise::isa, kIsa)
      .def("run",
           nb::overload_cast<const Rows&, const std::optional<Rows>&, const Result&, std::size_t>(&HeldPointwise::run, nb::const_), "x"_a.noconvert(), "other"_a.noconvert().none(), "y"_a.noconvert(), "threads"_a,
           "y = activation(x) * other, or + other; without `other`, activation(x).");
  nb::class_<HeldRotary, Instruction>(m, "Rotary", "Rotary position embedding.")
      .def(nb::init<std::string_view, bool>(), "isa"_a, "interleaved"_a)
      .def_prop_ro("isa", &HeldRotary::isa, kIsa)
      .def("run",
           nb::overload_cast<const Rows4&, const Rows3&, const Rows3&, const Result4&, std::size_t>(&HeldRotary::run, nb::const_), "x"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(), "y"_a.noconvert(),
           "threads"_a, "y = x * cos + turned(x) * sin.");
  nb::class_<HeldTable, Instruction>(m, "Table", "Rows of bytes that are looked up.")
      .def(nb::init<Matrix<const std::uint8_t>, bool>(), "table"_a, "bfloat16"_a = false)
      .def("run",
           nb::overload_cast<const Array<const std::int64_t>&, const Matrix<std::uint8_t>&, std::size_t>(&HeldTable::run, nb::const_), "indices"_a.noconvert(), "y"_a.noconvert(), "threads"_a, "y[i] = table[indices[i]].");
  nb::class_<HeldPackedTable, Instruction>(m, "PackedTable", "Rows of integers that are looked up as floats.")
      .def(nb::init<std::string_view, int, std::size_t, std::size_t,
                    nb::ndarray<const std::uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>, Matrix<const float>,
                    std::optional<Matrix<const std::uint8_t>>>(),
           "isa"_a, "bits"_a, "columns"_a, "group"_a, "codes"_a, "scales"_a, "zeros"_a.none())
      .def_prop_ro("isa", &HeldPackedTable::isa, kIsa)
      .def("run",
           nb::overload_cast<const Array<const std::int64_t>&, const Matrix<float>&, std::size_t>(&HeldPackedTable::run, nb::const_), "indices"_a.noconvert(), "y"_a.noconvert(), "threads"_a,
           "y[i] = (codes - zeros) * scales of row indices[i].");
}

}  // namespace graphwright
