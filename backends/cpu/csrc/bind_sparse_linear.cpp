// Linears whose weights are mostly zeros, for Python.
#include <string_view>
#include <utility>
#include <vector>

#include "bindings.h"
#include "float_linear.h"
#include "held_grid.h"
#include "isa.h"
#include "linear_output.h"
#include "sparse_block.h"
#include "sparse_gather.h"
#include "sparse_linear.h"
#include "sparse_skip.h"

namespace graphwright {
namespace {

using Bytes = Array<const std::uint8_t>;
using Words = Array<const std::uint64_t>;
using Scales = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

SparseShape shape_of(std::size_t outputs, std::size_t columns, std::string_view kind, std::size_t group) {
  SparseShape shape{outputs, columns, group, SparseValues::kFloat32};
  if (kind == "float32") shape.kind = SparseValues::kFloat32;
  else if (kind == "bfloat16") shape.kind = SparseValues::kBfloat16;
  else if (kind == "int8") shape.kind = SparseValues::kInt8;
  else if (kind == "int4") shape.kind = SparseValues::kInt4;
  else throw std::invalid_argument("kind must be float32, bfloat16, int8 or int4");
  expect(outputs > 0 && columns > 0, "there must be outputs and columns");
  expect(shape.coded() == (group > 0), "codes have groups, floats have none");
  return shape;
}

void pack_masks(const Matrix<const std::uint8_t>& stored, std::size_t columns, std::string_view kind, std::size_t group,
                const Array<std::uint64_t>& masks, const Array<std::uint64_t>& offsets, std::size_t threads) {
  const SparseShape shape = shape_of(stored.shape(0), columns, kind, group);
  expect(stored.shape(1) == (columns + 7) / 8, "stored has the wrong size");
  expect(masks.shape(0) == shape.panels() * shape.steps() * shape.words(), "masks has the wrong size");
  expect(offsets.shape(0) == shape.panels() * shape.blocks() + 1, "offsets has the wrong size");
  nb::gil_scoped_release release;
  pack_sparse_masks(shape, stored.data(), masks.data(), offsets.data(), threads);
}

void pack_values(const Matrix<const std::uint8_t>& stored, std::size_t columns, std::string_view kind, std::size_t group,
                 const Bytes& given, const Array<const std::int32_t>& row_offsets, const Words& masks, const Words& offsets,
                 const Array<std::uint8_t>& values, std::size_t threads) {
  const SparseShape shape = shape_of(stored.shape(0), columns, kind, group);
  const std::size_t row_bytes = (columns + 7) / 8;
  expect(stored.shape(1) == row_bytes, "stored has the wrong size");
  expect(masks.shape(0) == shape.panels() * shape.steps() * shape.words(), "masks has the wrong size");
  expect(offsets.shape(0) == shape.panels() * shape.blocks() + 1, "offsets has the wrong size");
  expect(row_offsets.shape(0) == shape.outputs + 1 && row_offsets.data()[0] == 0, "row_offsets has the wrong size");
  std::size_t count = 0;
  for (std::size_t n = 0; n < shape.outputs; ++n) {
    for (std::size_t column = 0; column < columns; ++column) {
      count += (stored.data()[n * row_bytes + column / 8] >> (column % 8)) & 1U;
    }
    expect(static_cast<std::size_t>(row_offsets.data()[n + 1]) == count, "the mask of a row has other values than its offsets");
  }
  const std::size_t each = kind == "float32" ? 8 : kind == "bfloat16" ? 4 : kind == "int8" ? 2 : 1;
  expect(given.shape(0) == (count * each + 1) / 2, "there are not as many values as the mask has bits");
  expect(values.shape(0) == offsets.data()[shape.panels() * shape.blocks()] + kSparseBeyond, "values has the wrong size");
  nb::gil_scoped_release release;
  pack_sparse_values(shape, given.data(), row_offsets.data(), masks.data(), offsets.data(), values.data(), threads);
}

// Holds its arrays, so that they live as long as it does.
class HeldSparseLinear : public LinearInstruction {
 public:
  HeldSparseLinear(std::string_view isa, std::size_t outputs, std::size_t columns, std::string_view kind, std::size_t group,
                   std::string_view compute, Words masks, Bytes values, Words offsets, std::optional<Scales> scales,
                   std::optional<Bytes> zeros, std::optional<Array<const float>> bias, std::string_view rounding,
                   std::optional<Array<const float>> input_steps, int input_zero, std::string_view gather_by,
                   std::size_t threads)
      : kernels_(graphwright::isa(isa).kernels()), shape_(shape_of(outputs, columns, kind, group)), masks_(std::move(masks)),
        offsets_(std::move(offsets)), values_(std::move(values)), scales_(std::move(scales)), zeros_(std::move(zeros)),
        bias_(std::move(bias)), grid_(rounding, std::move(input_steps), columns, input_zero) {
    const bool by_blocks = gather_by == "blocks", gather_columns = by_blocks || gather_by == "columns";
    expect(gather_columns || gather_by.empty(), "gather must be columns, blocks or nothing");
    const std::size_t panels = shape_.panels(), blocks = panels * shape_.blocks();
    expect(masks_.shape(0) == panels * shape_.steps() * shape_.words(), "masks has the wrong size");
    expect(offsets_.shape(0) == blocks + 1, "offsets has the wrong size");
    expect(values_.shape(0) == offsets_.data()[blocks] + kSparseBeyond, "values has the wrong size");
    data_of(bias_, outputs, "bias has the wrong size");
    sparse_ = {masks_.data(), values_.data(), offsets_.data(), outputs, panels, shape_.steps(), shape_.kind, nullptr, nullptr};
    rounded_ = compute == "int8";
    bfloat16_ = compute == "bfloat16";
    expect(rounded_ || bfloat16_ || compute == "float32", "compute must be float32, bfloat16 or int8");
    expect(rounded_ || !grid_.shifted(), "only rounded activations have a grid");
    if (!shape_.coded()) {
      expect(!rounded_ && !scales_ && !zeros_, "floats are multiplied as floats, and have no scales");
      expect(!by_blocks, "floats are gathered by columns");
      if (gather_columns) skipped_ = sort_panels(sparse_, threads);
      return;
    }
    expect(rounded_ || !gather_columns, "codes are gathered for rounded activations only");
    const std::size_t groups = (columns + group - 1) / group, cells = panels * groups * kPanel;
    expect(scales_.has_value() && scales_->shape(0) == cells, "scales has the wrong size");
    const auto type = scales_->dtype();
    const bool half = type.bits == 16;
    expect(type.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float) && (half || type.bits == 32),
           "scales must be float32 or float16");
    const std::size_t padded = shape_.group_steps() * 4;
    expect(!rounded_ || groups * padded <= kMaxDotLength / 2, "more columns than an int32 sum can hold");
    expect(!rounded_ || groups == 1 || padded == group, "a group must be whole steps");
    weights_.packed = {nullptr, scales_->data(), data_of(zeros_, cells, "zeros has the wrong size"), nullptr, outputs, panels,
                       groups, padded, 8, shape_.kind == SparseValues::kInt8 ? 128 : 8, half};
    weights_.columns = columns;
    weights_.group_size = group;
    weights_.coding = Coding::kInt8;
    expect((!grid_.shifted() && !gather_columns) || (groups == 1 && !zeros_), "one group without zero points is needed");
    if (grid_.shifted() || gather_columns) add_up();
    if (!gather_columns || kernels_.sparse_bytes->gathered == nullptr) return;
    if (by_blocks) {
      blocked_ = sort_blocks(kernels_, sparse_, weights_.packed, threads);
      for (const BlockedCodes& each : blocked_) {
        blocked_views_.push_back(each.view());
        blocks_ += each.codes.size();
      }
      sparse_.blocked = blocked_views_.data();
      return;
    }
    gathered_ = gather(kernels_, sparse_, weights_.packed, threads);
    view_ = gathered_.view();
    sparse_.gathered = &view_;
  }

  // Products of four columns for every output that more than a few rows take, and dense ones would; 0 where not gathered.
  std::size_t gathered_steps() const { return gathered_.slots.size(); }

  // Blocks of four columns of an output that more than a few rows take; 0 where they do not.
  std::size_t blocks() const { return blocks_; }

  const char* isa() const { return shape_.coded() ? kernels_.sparse_bytes->isa : kernels_.sparse_floats->isa; }

  void run(const Matrix<const float>& x, const Matrix<float>& y, std::size_t threads, std::string_view activation,
           const std::optional<Rows>& factor, const std::optional<Rows>& residual) const {
    expect(x.shape(1) == shape_.columns, "x has the wrong number of columns");
    expect(y.shape(0) == x.shape(0) && y.shape(1) == shape_.outputs, "y has the wrong shape");
    const LinearOutput output = output_of(y, bias(), activation, factor, residual);
    nb::gil_scoped_release release;
    multiply(x.data(), x.shape(0), output, threads);
  }

  void run(const Tensor* operands, std::size_t threads) const override {
    multiply(operands[0].as<const float>(), operands[0].rows(), output_of(operands, bias(), activation_), threads);
  }

 private:
  const float* bias() const { return bias_ ? bias_->data() : nullptr; }

  void multiply(const float* x, std::size_t rows, const LinearOutput& y, std::size_t threads) const {
    if (!shape_.coded()) {
      const SkipWeights* skipped = skipped_.empty() ? nullptr : skipped_.data();
      return run_sparse_linear(kernels_, sparse_, skipped, x, rows, y, threads);
    }
    if (!rounded_) return run_coded_linear(kernels_, weights_, bfloat16_, x, rows, y, threads, &sparse_);
    run_byte_linear(kernels_, weights_.packed, grid_.grid(), x, rows, shape_.columns, y, threads, &sparse_);
  }

  // Sums of the weights of each output.
  void add_up() {
    sums_.assign(sparse_.panels * kPanel, 0);
    for (std::size_t panel = 0; panel < sparse_.panels; ++panel) {
      const std::uint8_t* codes = expanded(kernels_, sparse_, weights_.packed, panel, 0);
      for (std::size_t step = 0; step < sparse_.steps; ++step, codes += kStepBytes) {
        for (std::size_t i = 0; i < kStepBytes; ++i) {
          sums_[panel * kPanel + i / 4] += std::int32_t{codes[i]} - weights_.packed.middle;
        }
      }
    }
    weights_.packed.sums = sums_.data();
  }

  KernelTable kernels_;
  SparseShape shape_;
  SparseWeights sparse_{};
  CodedWeights weights_{};
  bool rounded_ = false, bfloat16_ = false;
  std::size_t blocks_ = 0;
  std::vector<BlockedCodes> blocked_;
  std::vector<BlockedPanel> blocked_views_;
  Gathered gathered_;
  GatheredWeights view_{};
  std::vector<SkipWeights> skipped_;
  Words masks_, offsets_;
  Bytes values_;
  std::optional<Scales> scales_;
  std::optional<Bytes> zeros_;
  std::optional<Array<const float>> bias_;
  HeldGrid grid_;
  std::vector<std::int32_t> sums_;
};

}  // namespace

void bind_sparse_linear(nb::module_& m) {
  m.attr("SPARSE_BEYOND") = kSparseBeyond;
  m.attr("SPARSE_STEPS") = kSparseSteps;
  m.def("pack_sparse_masks", &pack_masks, "stored"_a, "columns"_a, "kind"_a, "group"_a, "masks"_a.noconvert(),
        "offsets"_a.noconvert(), "threads"_a, "Stored bits, uint8 [outputs, ceil(columns / 8)], into the kernels' layout.");
  m.def("pack_sparse_values", &pack_values, "stored"_a, "columns"_a, "kind"_a, "group"_a, "given"_a, "row_offsets"_a,
        "masks"_a, "offsets"_a, "values"_a.noconvert(), "threads"_a, "Stored values, as bytes, into the kernels' layout.");
  nb::class_<HeldSparseLinear, LinearInstruction>(m, "SparseLinear", "A linear whose weights are mostly zeros.")
      .def(nb::init<std::string_view, std::size_t, std::size_t, std::string_view, std::size_t, std::string_view, Words, Bytes,
                    Words, std::optional<Scales>, std::optional<Bytes>, std::optional<Array<const float>>, std::string_view,
                    std::optional<Array<const float>>, int, std::string_view, std::size_t>(),
           "isa"_a, "outputs"_a, "columns"_a, "kind"_a, "group"_a, "compute"_a, "masks"_a, "values"_a, "offsets"_a,
           "scales"_a.none(), "zeros"_a.none(), "bias"_a.none(), "rounding"_a, "input_steps"_a.none(), "input_zero"_a,
           "gather"_a, "threads"_a)
      .def_prop_ro("gathered_steps", &HeldSparseLinear::gathered_steps, "Slots of the gathered weights, of all panels.")
      .def_prop_ro("blocks", &HeldSparseLinear::blocks, "Blocks of four columns of an output, of all outputs.")
      .def_prop_ro("isa", &HeldSparseLinear::isa, "The instruction set of the kernel that runs.")
      .def("run",
           nb::overload_cast<const Matrix<const float>&, const Matrix<float>&, std::size_t, std::string_view,
                             const std::optional<Rows>&, const std::optional<Rows>&>(&HeldSparseLinear::run, nb::const_),
           "x"_a.noconvert(), "y"_a.noconvert(), "threads"_a, "activation"_a = "",
           "factor"_a.noconvert().none() = nb::none(), "residual"_a.noconvert().none() = nb::none(),
           "y = activation(x Wᵀ + b) * factor + residual for rows of floats.");
}

}  // namespace graphwright
