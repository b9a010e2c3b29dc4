// Linears on Kronecker products, for Python.
#include <string_view>
#include <utility>

#include "bindings.h"
#include "isa.h"
#include "kron_linear.h"
#include "linear_output.h"

namespace graphwright {
namespace {

// Holds its arrays, so that they live as long as it does.
class HeldKronLinear : public LinearInstruction {
 public:
  HeldKronLinear(std::string_view isa, Matrix<const float> a, Matrix<const float> b_columns, float scale, bool b_first)
      : kernels_(graphwright::isa(isa).kernels()), a_(std::move(a)), b_columns_(std::move(b_columns)) {
    weights_ = {a_.data(), b_columns_.data(), a_.shape(0), a_.shape(1), b_columns_.shape(1), b_columns_.shape(0), scale,
                b_first};
    expect(weights_.columns() > 0 && weights_.outputs() > 0, "there must be outputs and columns");
  }

  const char* isa() const { return kernels_.kron_linear->isa; }

  void run(const Matrix<const float>& x, const Matrix<float>& y, std::size_t threads, std::string_view activation,
           const std::optional<Rows>& factor, const std::optional<Rows>& residual) const {
    expect(x.shape(1) == weights_.columns(), "x has the wrong number of columns");
    expect(y.shape(0) == x.shape(0) && y.shape(1) == weights_.outputs(), "y has the wrong shape");
    const LinearOutput output = output_of(y, nullptr, activation, factor, residual);
    nb::gil_scoped_release release;
    run_kron_linear(kernels_, weights_, x.data(), x.shape(0), output, threads);
  }

  void run(const Tensor* operands, std::size_t threads) const override {
    const LinearOutput output = output_of(operands, nullptr, activation_);
    run_kron_linear(kernels_, weights_, operands[0].as<const float>(), operands[0].rows(), output, threads);
  }

 private:
  KernelTable kernels_;
  Matrix<const float> a_, b_columns_;
  KronWeights weights_{};
};

}  // namespace

void bind_kron_linear(nb::module_& m) {
  nb::class_<HeldKronLinear, LinearInstruction>(m, "KronLinear", "A linear on a Kronecker product.")
      .def(nb::init<std::string_view, Matrix<const float>, Matrix<const float>, float, bool>(), "isa"_a, "a"_a,
           "b_columns"_a, "scale"_a, "b_first"_a)
      .def_prop_ro("isa", &HeldKronLinear::isa, "The instruction set of the kernel that runs.")
      .def("run",
           nb::overload_cast<const Matrix<const float>&, const Matrix<float>&, std::size_t, std::string_view,
                             const std::optional<Rows>&, const std::optional<Rows>&>(&HeldKronLinear::run, nb::const_),
           "x"_a, "y"_a, "threads"_a, "activation"_a = "", "factor"_a = nb::none(), "residual"_a = nb::none(),
           "y = activation(scale · x (A ⊗ B)ᵀ) * factor + residual for rows of floats.");
}

}  // namespace graphwright
