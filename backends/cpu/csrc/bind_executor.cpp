// The executor, for Python: programs are put together value by value and then run without Python.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <utility>
#include <vector>

#include "bindings.h"
#include "executor.h"

namespace graphwright {
namespace {

using AnyArray = nb::ndarray<nb::ro, nb::device::cpu>;

Element element_of(const nb::dlpack::dtype& dtype) {
  const auto is = [&](nb::dlpack::dtype_code code, int bits) {
    return dtype.code == static_cast<std::uint8_t>(code) && dtype.bits == bits;
  };
  if (is(nb::dlpack::dtype_code::Float, 32)) return Element::kFloat;
  if (is(nb::dlpack::dtype_code::Int, 16)) return Element::kBf16;  // numpy has none: its bits come as integers
  if (is(nb::dlpack::dtype_code::Int, 8)) return Element::kInt8;
  if (is(nb::dlpack::dtype_code::Int, 64)) return Element::kInt64;
  if (is(nb::dlpack::dtype_code::Bool, 8)) return Element::kBool;
  if (is(nb::dlpack::dtype_code::UInt, 8)) return Element::kUint8;
  throw std::invalid_argument("the executor has no such dtype");
}

Element element_named(std::string_view name) {
  if (name == "float32") return Element::kFloat;
  if (name == "bfloat16") return Element::kBf16;
  if (name == "int8") return Element::kInt8;
  if (name == "int64") return Element::kInt64;
  if (name == "bool") return Element::kBool;
  if (name == "uint8") return Element::kUint8;
  throw std::invalid_argument("the executor has no dtype '" + std::string(name) + "'");
}

nb::dlpack::dtype dtype_of(Element element) {
  switch (element) {
    case Element::kFloat: return nb::dtype<float>();
    case Element::kBf16: return nb::dtype<std::int16_t>();
    case Element::kInt8: return nb::dtype<std::int8_t>();
    case Element::kInt64: return nb::dtype<std::int64_t>();
    case Element::kBool: return nb::dtype<bool>();
    default: return nb::dtype<std::uint8_t>();
  }
}

Tensor tensor_of(const AnyArray& array) {
  expect(array.ndim() <= kMostAxes, "a tensor has too many axes");
  Tensor tensor{};
  tensor.data = const_cast<void*>(array.data());
  tensor.element = element_of(array.dtype());
  tensor.axes = array.ndim();
  for (std::size_t axis = 0; axis < tensor.axes; ++axis) {
    tensor.shape[axis] = array.shape(axis);
    tensor.strides[axis] = array.stride(axis);
  }
  return tensor;
}

nb::object array_of(const Tensor& tensor, nb::handle owner) {
  std::int64_t strides[kMostAxes];
  for (std::size_t axis = 0; axis < tensor.axes; ++axis) strides[axis] = tensor.strides[axis];
  return nb::cast(nb::ndarray<nb::numpy>(tensor.data, tensor.axes, tensor.shape, owner, strides, dtype_of(tensor.element)));
}

// Calls a Python function with the operands as arrays; it fills in the outputs.
class PythonCall : public Instruction {
 public:
  explicit PythonCall(nb::callable function) : function_(std::move(function)) {}

  Layout layout(std::size_t) const override { return Layout::kAny; }

  void set_operands(std::size_t count) { count_ = count; }

  void run(const Tensor* operands, std::size_t) const override {
    const nb::gil_scoped_acquire acquire;
    nb::list arrays;
    for (std::size_t i = 0; i < count_; ++i) {
      if (operands[i].data == nullptr) arrays.append(nb::none());
      else arrays.append(array_of(operands[i], nb::none()));
    }
    function_(arrays);
  }

 private:
  nb::callable function_;
  std::size_t count_ = 0;
};

// The instructions of a program. Sizes are lists of integers: see SizeOp.
class Executor {
 public:
  explicit Executor(std::size_t symbols) { steps_.symbols = symbols; }

  std::size_t input(std::string_view element, std::vector<Size> shape) {
    return add({Value::Kind::kInput, element_named(element), checked(std::move(shape))});
  }

  std::size_t bound(std::string_view element, std::vector<Size> shape) {
    return add({Value::Kind::kBound, element_named(element), checked(std::move(shape))});
  }

  std::size_t buffer(std::string_view element, std::vector<Size> shape) {
    return add({Value::Kind::kBuffer, element_named(element), checked(std::move(shape))});
  }

  std::size_t constant(AnyArray array) {
    Value value{Value::Kind::kConstant};
    value.constant = tensor_of(array);
    value.element = value.constant.element;
    held_.append(nb::cast(array));
    return add(std::move(value));
  }

  std::size_t reshape(std::size_t base, std::vector<Size> shape) {
    Value value{Value::Kind::kReshape, element(base), checked(std::move(shape))};
    value.base = base;
    return add(std::move(value));
  }

  std::size_t permute(std::size_t base, std::vector<std::size_t> axes) {
    Value value{Value::Kind::kPermute, element(base)};
    for (const std::size_t axis : axes) expect(axis < axes.size(), "there is no such axis");
    value.base = base;
    value.axes = std::move(axes);
    return add(std::move(value));
  }

  std::size_t narrow(std::size_t base, std::size_t axis, Size begin, Size length) {
    Value value{Value::Kind::kNarrow, element(base)};
    value.base = base;
    value.axis = axis;
    value.begin = std::move(begin);
    value.length = std::move(length);
    return add(std::move(value));
  }

  void add_step(const nb::object& instruction, std::vector<std::int64_t> operands, std::size_t inputs) {
    auto* call = nb::cast<Instruction*>(instruction);
    Step step{call, {}, inputs};
    expect(inputs <= operands.size(), "there are more inputs than operands");
    for (const std::int64_t operand : operands) {
      expect(operand < static_cast<std::int64_t>(steps_.values.size()), "there is no such value");
      step.operands.push_back(operand < 0 ? kAbsent : static_cast<std::size_t>(operand));
    }
    if (auto* python = dynamic_cast<PythonCall*>(call)) python->set_operands(operands.size());
    held_.append(instruction);
    steps_.steps.push_back(std::move(step));
  }

  void output(std::size_t value) {
    element(value);
    steps_.outputs.push_back(value);
  }

  std::size_t count() const { return steps_.steps.size(); }
  const Steps& steps() const { return steps_; }

 private:
  static std::vector<Size> checked(std::vector<Size> shape) {
    expect(shape.size() <= kMostAxes, "a tensor has too many axes");
    for (const Size& size : shape) expect(size.size() >= 2, "a size is no expression");
    return shape;
  }

  Element element(std::size_t value) const {
    expect(value < steps_.values.size(), "there is no such value");
    return steps_.values[value].element;
  }

  std::size_t add(Value value) {
    value.made_at = steps_.steps.size();
    steps_.values.push_back(std::move(value));
    return steps_.values.size() - 1;
  }

  Steps steps_;
  nb::list held_;  // constants and instructions, so that they live as long as this
};

class HeldRunner {
 public:
  explicit HeldRunner(nb::object executor) : executor_(std::move(executor)), runner_(nb::cast<Executor&>(executor_).steps()) {}

  void bind(std::size_t value, const AnyArray& array) {
    runner_.bind(value, tensor_of(array));
    bound_.append(nb::cast(array));
  }

  nb::list run(const std::vector<AnyArray>& inputs, std::size_t threads) { return call(inputs, threads, nullptr); }

  // The outputs, and nanoseconds by step.
  std::vector<std::uint64_t> profile(const std::vector<AnyArray>& inputs, std::size_t threads) {
    std::vector<std::uint64_t> spent(nb::cast<Executor&>(executor_).count());
    call(inputs, threads, spent.data());
    return spent;
  }

  void cancel() { runner_.cancel(); }
  std::size_t arena_bytes() const { return runner_.arena_bytes(); }
  std::size_t plans() const { return runner_.plans(); }

 private:
  nb::list call(const std::vector<AnyArray>& inputs, std::size_t threads, std::uint64_t* spent) {
    std::vector<Tensor> given;
    given.reserve(inputs.size());
    for (const AnyArray& input : inputs) {
      given.push_back(tensor_of(input));
      std::ptrdiff_t stride = 1;
      for (std::size_t axis = given.back().axes; axis-- > 0;) {
        expect(input.size() == 0 || given.back().shape[axis] == 1 || given.back().strides[axis] == stride,
               "inputs must be contiguous");
        stride *= static_cast<std::ptrdiff_t>(given.back().shape[axis]);
      }
    }
    const std::vector<Tensor>* outputs = nullptr;
    {
      const nb::gil_scoped_release release;
      outputs = &runner_.run(given, threads, spent);
    }
    nb::list found;
    for (const Tensor& output : *outputs) found.append(array_of(output, nb::find(this)));
    return found;
  }

  nb::object executor_;
  Runner runner_;
  nb::list bound_;
};

}  // namespace

void bind_executor(nb::module_& m) {
  nb::exception<Cancelled>(m, "Cancelled");
  nb::class_<PythonCall, Instruction>(m, "PythonCall", "Calls a function with its operands as arrays, the outputs among them.")
      .def(nb::init<nb::callable>(), "function"_a);
  nb::class_<Executor>(m, "Executor", "A program as instructions on values. Values are numbers; a negative one is absent.")
      .def(nb::init<std::size_t>(), "symbols"_a)
      .def("input", &Executor::input, "element"_a, "shape"_a, "A value that every call gives.")
      .def("bound", &Executor::bound, "element"_a, "shape"_a, "A value that a runner is bound to.")
      .def("constant", &Executor::constant, "array"_a)
      .def("buffer", &Executor::buffer, "element"_a, "shape"_a, "A value that the next instruction writes.")
      .def("reshape", &Executor::reshape, "base"_a, "shape"_a)
      .def("permute", &Executor::permute, "base"_a, "axes"_a)
      .def("narrow", &Executor::narrow, "base"_a, "axis"_a, "begin"_a, "length"_a)
      .def("add_step", &Executor::add_step, "instruction"_a, "operands"_a, "inputs"_a,
           "The first `inputs` operands are read, the others written.")
      .def("output", &Executor::output, "value"_a)
      .def_prop_ro("steps", &Executor::count, "How many instructions there are.");
  nb::class_<HeldRunner>(m, "Runner", "Memory and plans for calls of an executor, one at a time.")
      .def(nb::init<nb::object>(), "executor"_a)
      .def("bind", &HeldRunner::bind, "value"_a, "array"_a)
      .def("run", &HeldRunner::run, "inputs"_a, "threads"_a, "The outputs: arrays that the next call overwrites.")
      .def("profile", &HeldRunner::profile, "inputs"_a, "threads"_a, "Run, and give the nanoseconds of each instruction.")
      .def("cancel", &HeldRunner::cancel, "End a call that is running; it raises Cancelled.")
      .def_prop_ro("arena_bytes", &HeldRunner::arena_bytes)
      .def_prop_ro("plans", &HeldRunner::plans, "Sizes that memory is planned for.");
}

}  // namespace graphwright
