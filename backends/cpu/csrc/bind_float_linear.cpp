// Linears that compute in floats, for Python.
#include <string_view>
#include <utility>

#include "bindings.h"
#include "float_linear.h"
#include "isa.h"
#include "linear_output.h"

namespace graphwright {
namespace {

void pack_floats(const Matrix<const float>& stored, bool bfloat16, const Array<std::uint8_t>& values,
                 std::size_t threads) {
  const std::size_t outputs = stored.shape(0), columns = stored.shape(1);
  expect(values.shape(0) == dense_bytes(outputs, columns, bfloat16), "values has the wrong size");
  nb::gil_scoped_release release;
  pack_dense(stored.data(), bfloat16, outputs, columns, values.data(), threads);
}

void pack_bfloat16(const Matrix<const std::uint16_t>& stored, const Array<std::uint8_t>& values, std::size_t threads) {
  const std::size_t outputs = stored.shape(0), columns = stored.shape(1);
  expect(values.shape(0) == dense_bytes(outputs, columns, true), "values has the wrong size");
  nb::gil_scoped_release release;
  pack_dense(stored.data(), outputs, columns, values.data(), threads);
}

// Holds its arrays, so that they live as long as it does.
class HeldFloatLinear : public LinearInstruction {
 public:
  HeldFloatLinear(std::string_view isa, std::size_t outputs, std::size_t columns, bool bfloat16,
                  Array<const std::uint8_t> values, std::optional<Array<const float>> bias)
      : kernels_(graphwright::isa(isa).kernels()), bfloat16_(bfloat16), values_(std::move(values)),
        bias_(std::move(bias)) {
    expect(outputs > 0 && columns > 0, "there must be outputs and columns");
    expect(values_.shape(0) == dense_bytes(outputs, columns, bfloat16), "values has the wrong size");
    data_of(bias_, outputs, "bias has the wrong size");
    weights_ = {values_.data(), outputs, columns};
  }

  const char* isa() const { return kernels_.float_linear->isa; }

  void run(const Matrix<const float>& x, const Matrix<float>& y, std::size_t threads, std::string_view activation,
           const std::optional<Rows>& factor, const std::optional<Rows>& residual) const {
    expect(x.shape(1) == weights_.columns, "x has the wrong number of columns");
    expect(y.shape(0) == x.shape(0) && y.shape(1) == weights_.outputs, "y has the wrong shape");
    const LinearOutput output = output_of(y, bias_ ? bias_->data() : nullptr, activation, factor, residual);
    nb::gil_scoped_release release;
    run_dense_linear(kernels_, weights_, bfloat16_, x.data(), x.shape(0), output, threads);
  }

  void run(const Tensor* operands, std::size_t threads) const override {
    const LinearOutput output = output_of(operands, bias_ ? bias_->data() : nullptr, activation_);
    run_dense_linear(kernels_, weights_, bfloat16_, operands[0].as<const float>(), operands[0].rows(), output, threads);
  }

 private:
  KernelTable kernels_;
  DenseWeights weights_{};
  bool bfloat16_;
  Array<const std::uint8_t> values_;
  std::optional<Array<const float>> bias_;
};

class HeldNarrowLinear : public LinearInstruction {
 public:
  HeldNarrowLinear(std::string_view isa, std::size_t outputs, std::size_t columns, bool bfloat16,
                   Array<const std::uint8_t> values, std::optional<Array<const float>> bias)
      : kernels_(graphwright::isa(isa).kernels()), bfloat16_(bfloat16), values_(std::move(values)),
        bias_(std::move(bias)) {
    expect(outputs > 0 && columns > 0, "there must be outputs and columns");
    expect(outputs <= kNarrow, "there are too many outputs");
    expect(values_.shape(0) == outputs * columns * (bfloat16 ? 2 : 4), "values has the wrong size");
    data_of(bias_, outputs, "bias has the wrong size");
    weights_ = {values_.data(), outputs, columns};
  }

  const char* isa() const { return kernels_.float_linear->isa; }

  void run(const Matrix<const float>& x, const Matrix<float>& y, std::size_t threads, std::string_view activation,
           const std::optional<Rows>& factor, const std::optional<Rows>& residual) const {
    expect(x.shape(1) == weights_.columns, "x has the wrong number of columns");
    expect(y.shape(0) == x.shape(0) && y.shape(1) == weights_.outputs, "y has the wrong shape");
    const LinearOutput output = output_of(y, bias_ ? bias_->data() : nullptr, activation, factor, residual);
    nb::gil_scoped_release release;
    run_narrow_linear(kernels_, weights_, bfloat16_, x.data(), x.shape(0), output, threads);
  }

  void run(const Tensor* operands, std::size_t threads) const override {
    const LinearOutput output = output_of(operands, bias_ ? bias_->data() : nullptr, activation_);
    run_narrow_linear(kernels_, weights_, bfloat16_, operands[0].as<const float>(), operands[0].rows(), output, threads);
  }

 private:
  KernelTable kernels_;
  NarrowWeights weights_{};
  bool bfloat16_;
  Array<const std::uint8_t> values_;
  std::optional<Array<const float>> bias_;
};

using Scales = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Coding coding_of(std::string_view name) {
  constexpr std::pair<std::string_view, Coding> kCodings[] = {{"int2", Coding::kInt2},   {"int4", Coding::kInt4},
                                                              {"int8", Coding::kInt8},   {"table4", Coding::kTable4},
                                                              {"e4m3", Coding::kE4m3},   {"e5m2", Coding::kE5m2}};
  for (const auto& [known, coding] : kCodings) {
    if (known == name) return coding;
  }
  throw nb::value_error("coding must be int2, int4, int8, table4, e4m3 or e5m2");
}

class HeldNbitsLinear : public LinearInstruction {
 public:
  HeldNbitsLinear(std::string_view isa, std::size_t outputs, std::size_t columns, std::string_view coding,
                  std::size_t group_size, bool bfloat16, Array<const std::uint8_t> codes, Scales scales,
                  std::optional<Array<const std::uint8_t>> zeros, std::optional<Array<const float>> table,
                  std::optional<Array<const float>> bias)
      : kernels_(graphwright::isa(isa).kernels()), bfloat16_(bfloat16), codes_(std::move(codes)),
        scales_(std::move(scales)), zeros_(std::move(zeros)), table_(std::move(table)), bias_(std::move(bias)) {
    weights_.coding = coding_of(coding);
    const bool integers = weights_.coding <= Coding::kInt8, looked_up = weights_.coding == Coding::kTable4;
    expect(looked_up == table_.has_value(), "codes of a table, and no others, come with a table");
    expect(integers || !zeros_, "only integers have zero points");
    weights_.table = data_of(table_, 16, "table has the wrong size");
    const int bits = width_of(weights_.coding);
    expect(outputs > 0 && columns > 0 && group_size > 0, "there must be outputs, columns and groups of columns");
    const std::size_t step = 32 / static_cast<std::size_t>(bits);
    const std::size_t panels = (outputs + kPanel - 1) / kPanel, groups = (columns + group_size - 1) / group_size;
    const std::size_t group = (group_size + step - 1) / step * step, cells = panels * groups * kPanel;
    expect(codes_.shape(0) == panels * groups * (group / step) * kStepBytes, "codes has the wrong size");
    expect(scales_.shape(0) == cells, "scales has the wrong size");
    const auto kind = scales_.dtype();
    const bool half = kind.bits == 16;
    expect(kind.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float) && (half || kind.bits == 32),
           "scales must be float32 or float16");
    weights_.packed = {codes_.data(), scales_.data(), data_of(zeros_, cells, "zeros has the wrong size"), nullptr, outputs,
                       panels, groups, group, bits, 1 << (bits - 1), half};
    weights_.columns = columns;
    weights_.group_size = group_size;
    data_of(bias_, outputs, "bias has the wrong size");
  }

  const char* isa() const { return kernels_.float_linear->isa; }
  // The most rows for which nothing is rounded, or nothing where that never happens.
  std::optional<std::size_t> exact_rows() const {
    if (!bfloat16_ || !kernels_.float_linear->pairs) return std::nullopt;
    return kFewRowsBfloat16;
  }

  void run(const Matrix<const float>& x, const Matrix<float>& y, std::size_t threads, std::string_view activation,
           const std::optional<Rows>& factor, const std::optional<Rows>& residual) const {
    expect(x.shape(1) == weights_.columns, "x has the wrong number of columns");
    expect(y.shape(0) == x.shape(0) && y.shape(1) == weights_.packed.outputs, "y has the wrong shape");
    const LinearOutput output = output_of(y, bias_ ? bias_->data() : nullptr, activation, factor, residual);
    nb::gil_scoped_release release;
    run_coded_linear(kernels_, weights_, bfloat16_, x.data(), x.shape(0), output, threads);
  }

  void run(const Tensor* operands, std::size_t threads) const override {
    const LinearOutput output = output_of(operands, bias_ ? bias_->data() : nullptr, activation_);
    run_coded_linear(kernels_, weights_, bfloat16_, operands[0].as<const float>(), operands[0].rows(), output, threads);
  }

 private:
  KernelTable kernels_;
  CodedWeights weights_{};
  bool bfloat16_;
  Array<const std::uint8_t> codes_;
  Scales scales_;
  std::optional<Array<const std::uint8_t>> zeros_;
  std::optional<Array<const float>> table_, bias_;
};

}  // namespace

void bind_float_linear(nb::module_& m) {
  m.def("pack_floats", &pack_floats, "stored"_a, "bfloat16"_a, "values"_a, "threads"_a,
        "Weights, float32 [outputs, columns], into the layout that the kernels stream, rounded to bfloat16 or not.");
  m.def("pack_bfloat16", &pack_bfloat16, "stored"_a, "values"_a, "threads"_a,
        "The same for bfloat16 weights, seen as uint16.");

  constexpr const char* run = "y = activation(x Wᵀ + b) * factor + residual for rows of floats.";
  nb::class_<HeldFloatLinear, LinearInstruction>(m, "FloatLinear", "A linear on dense weights.")
      .def(nb::init<std::string_view, std::size_t, std::size_t, bool, Array<const std::uint8_t>,
                    std::optional<Array<const float>>>(),
           "isa"_a, "outputs"_a, "columns"_a, "bfloat16"_a, "values"_a, "bias"_a.none())
      .def_prop_ro("isa", &HeldFloatLinear::isa, "The instruction set of the kernel that runs.")
      .def("run", nb::overload_cast<const Matrix<const float>&, const Matrix<float>&, std::size_t, std::string_view,
                                   const std::optional<Rows>&, const std::optional<Rows>&>(&HeldFloatLinear::run, nb::const_), "x"_a, "y"_a, "threads"_a, "activation"_a = "", "factor"_a = nb::none(),
           "residual"_a = nb::none(), run);

  nb::class_<HeldNarrowLinear, LinearInstruction>(m, "NarrowLinear", "A linear of few outputs on dense weights.")
      .def(nb::init<std::string_view, std::size_t, std::size_t, bool, Array<const std::uint8_t>,
                    std::optional<Array<const float>>>(),
           "isa"_a, "outputs"_a, "columns"_a, "bfloat16"_a, "values"_a, "bias"_a.none())
      .def_prop_ro("isa", &HeldNarrowLinear::isa, "The instruction set of the kernel that runs.")
      .def("run", nb::overload_cast<const Matrix<const float>&, const Matrix<float>&, std::size_t, std::string_view,
                                   const std::optional<Rows>&, const std::optional<Rows>&>(&HeldNarrowLinear::run, nb::const_), "x"_a, "y"_a, "threads"_a, "activation"_a = "", "factor"_a = nb::none(),
           "residual"_a = nb::none(), run);
  m.attr("MOST_NARROW") = kNarrow;

  nb::class_<HeldNbitsLinear, LinearInstruction>(m, "NbitsLinear", "A linear on packed codes that computes in floats.")
      .def(nb::init<std::string_view, std::size_t, std::size_t, std::string_view, std::size_t, bool,
                    Array<const std::uint8_t>, Scales, std::optional<Array<const std::uint8_t>>,
                    std::optional<Array<const float>>, std::optional<Array<const float>>>(),
           "isa"_a, "outputs"_a, "columns"_a, "coding"_a, "group_size"_a, "bfloat16"_a, "codes"_a, "scales"_a,
           "zeros"_a.none(), "table"_a.none(), "bias"_a.none())
      .def_prop_ro("isa", &HeldNbitsLinear::isa, "The instruction set of the kernel that runs.")
      .def_prop_ro("exact_rows", &HeldNbitsLinear::exact_rows,
                   "Beyond so many rows weights and activations are rounded to bfloat16; None: never.")
      .def("run", nb::overload_cast<const Matrix<const float>&, const Matrix<float>&, std::size_t, std::string_view,
                                   const std::optional<Rows>&, const std::optional<Rows>&>(&HeldNbitsLinear::run, nb::const_), "x"_a, "y"_a, "threads"_a, "activation"_a = "", "factor"_a = nb::none(),
           "residual"_a = nb::none(), run);
}

}  // namespace graphwright
