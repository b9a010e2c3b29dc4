// Linears on integer weights, for Python.
#include <string_view>
#include <utility>

#include "bindings.h"
#include "byte_linear.h"
#include "held_grid.h"
#include "isa.h"
#include "linear_output.h"

namespace graphwright {
namespace {

void pack(const nb::ndarray<const std::uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>& stored, int bits,
          const Array<std::uint8_t>& codes, std::size_t threads) {
  const std::size_t outputs = stored.shape(0), groups = stored.shape(1), group_bytes = stored.shape(2);
  const std::size_t panels = (outputs + kPanel - 1) / kPanel;
  expect(bits == 2 || bits == 4 || bits == 8, "bits must be 2, 4 or 8");
  expect(codes.shape(0) == panels * groups * ((group_bytes + 3) / 4) * kStepBytes, "codes has the wrong size");
  nb::gil_scoped_release release;
  pack_codes(stored.data(), bits, outputs, groups, group_bytes, codes.data(), threads);
}

// Holds its arrays, so that they live as long as it does.
class HeldByteLinear : public LinearInstruction {
 public:
  HeldByteLinear(std::string_view isa, std::size_t outputs, std::size_t columns, int bits, std::size_t group,
             Array<const std::uint8_t> codes, nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu> scales,
             std::optional<Array<const std::uint8_t>> zeros, std::optional<Array<const std::int32_t>> sums,
             std::optional<Array<const float>> bias, std::string_view rounding, std::optional<Array<const float>> steps,
             int zero)
      : kernels_(graphwright::isa(isa).kernels()), columns_(columns), codes_(std::move(codes)), scales_(std::move(scales)),
        zeros_(std::move(zeros)), sums_(std::move(sums)), bias_(std::move(bias)), grid_(rounding, std::move(steps), columns, zero) {
    expect(bits == 2 || bits == 4 || bits == 8, "bits must be 2, 4 or 8");
    const std::size_t step = 32 / static_cast<std::size_t>(bits);
    expect(group > 0 && group % step == 0, "a group must be whole steps");
    expect(outputs > 0 && columns > 0, "there must be outputs and columns");
    const std::size_t panels = (outputs + kPanel - 1) / kPanel, groups = (columns + group - 1) / group;
    const std::size_t cells = panels * groups * kPanel;
    expect(groups * group <= kMaxDotLength / 2, "more columns than an int32 sum can hold");
    expect(codes_.shape(0) == panels * groups * (group / step) * kStepBytes, "codes has the wrong size");
    expect(scales_.shape(0) == cells, "scales has the wrong size");
    const auto kind = scales_.dtype();
    const bool half = kind.bits == 16;
    expect(kind.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float) && (half || kind.bits == 32),
           "scales must be float32 or float16");
    weights_ = {codes_.data(), scales_.data(), data_of(zeros_, cells, "zeros has the wrong size"),
                data_of(sums_, panels * kPanel, "sums has the wrong size"), outputs, panels, groups, group, bits,
                1 << (bits - 1), half};
    data_of(bias_, outputs, "bias has the wrong size");
    expect(!grid_.shifted() || (groups == 1 && sums_.has_value()), "one group, and sums, are needed");
  }

  const char* isa() const { return kernels_.byte_linear->isa; }

  void run(const Matrix<const float>& x, const Matrix<float>& y, std::size_t threads, std::string_view activation,
           const std::optional<Rows>& factor, const std::optional<Rows>& residual) const {
    expect(x.shape(1) == columns_, "x has the wrong number of columns");
    expect(y.shape(0) == x.shape(0) && y.shape(1) == weights_.outputs, "y has the wrong shape");
    const LinearOutput output = output_of(y, bias_ ? bias_->data() : nullptr, activation, factor, residual);
    nb::gil_scoped_release release;
    run_byte_linear(kernels_, weights_, grid_.grid(), x.data(), x.shape(0), columns_, output, threads);
  }

  void run(const Tensor* operands, std::size_t threads) const override {
    const LinearOutput output = output_of(operands, bias_ ? bias_->data() : nullptr, activation_);
    run_byte_linear(kernels_, weights_, grid_.grid(), operands[0].as<const float>(), operands[0].rows(), columns_, output, threads);
  }

 private:
  KernelTable kernels_;
  PackedLinear weights_{};
  std::size_t columns_;
  Array<const std::uint8_t> codes_;
  nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu> scales_;
  std::optional<Array<const std::uint8_t>> zeros_;
  std::optional<Array<const std::int32_t>> sums_;
  std::optional<Array<const float>> bias_;
  HeldGrid grid_;
};

}  // namespace

void bind_byte_linear(nb::module_& m) {
  m.def("pack_codes", &pack, "stored"_a, "bits"_a, "codes"_a.noconvert(), "threads"_a,
        "Stored codes, uint8 [outputs, groups, bytes], into the layout that the kernels stream.");

  nb::class_<LinearInstruction, Instruction>(m, "LinearInstruction", "What linears have in common for the executor.")
      .def_prop_rw("activation", nullptr, &LinearInstruction::set_activation, kActivationDoc);

  nb::class_<HeldByteLinear, LinearInstruction>(m, "ByteLinear", "A linear on packed integer weights; activations are rounded to bytes.")
      .def(nb::init<std::string_view, std::size_t, std::size_t, int, std::size_t, Array<const std::uint8_t>,
                    nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>, std::optional<Array<const std::uint8_t>>,
                    std::optional<Array<const std::int32_t>>, std::optional<Array<const float>>, std::string_view,
                    std::optional<Array<const float>>, int>(),
           "isa"_a, "outputs"_a, "columns"_a, "bits"_a, "group"_a, "codes"_a, "scales"_a, "zeros"_a.none(), "sums"_a.none(),
           "bias"_a.none(), "rounding"_a, "steps"_a.none(), "zero"_a)
      .def_prop_ro("isa", &HeldByteLinear::isa, "The instruction set of the kernel that runs.")
      .def("run", nb::overload_cast<const Matrix<const float>&, const Matrix<float>&, std::size_t, std::string_view,
                                   const std::optional<Rows>&, const std::optional<Rows>&>(&HeldByteLinear::run, nb::const_), "x"_a.noconvert(), "y"_a.noconvert(), "threads"_a, "activation"_a = "",
           "factor"_a.noconvert().none() = nb::none(), "residual"_a.noconvert().none() = nb::none(), "y = activation(x Wᵀ + b) * factor + residual for rows of floats.");
}

}  // namespace graphwright
