// Instructions on indices and rows: too little work to be worth an instruction set or threads.
#include <cstring>
#include <limits>
#include <string>

#include "bindings.h"
#include "instruction.h"

namespace graphwright {
namespace {

// Operands: y int64 [N]. y[i] = begin + i.
class Arange : public Instruction {
 public:
  explicit Arange(std::int64_t begin) : begin_(begin) {}

  void run(const Tensor* operands, std::size_t) const override {
    auto* y = operands[0].as<std::int64_t>();
    for (std::size_t i = 0; i < operands[0].size(); ++i) y[i] = begin_ + static_cast<std::int64_t>(i);
  }

 private:
  std::int64_t begin_;
};

// Operands: a and b int64, each of y's shape or broadcast to it; y. b may be left out: then it is the number given.
class IntegerOperation : public Instruction {
 public:
  IntegerOperation(std::string_view name, std::int64_t number) : number_(number) {
    if (name == "add") multiplies_ = false;
    else if (name == "mul") multiplies_ = true;
    else throw std::invalid_argument("no integer operation is called '" + std::string(name) + "'");
  }

  Layout layout(std::size_t) const override { return Layout::kAny; }

  void run(const Tensor* operands, std::size_t) const override {
    const Tensor& y = operands[2];
    auto* result = y.as<std::int64_t>();
    for (std::size_t i = 0; i < y.size(); ++i) {
      const std::int64_t a = at(operands[0], y, i), b = operands[1].data == nullptr ? number_ : at(operands[1], y, i);
      // Unsigned: what overflows wraps, as PyTorch's does.
      const auto left = static_cast<std::uint64_t>(a), right = static_cast<std::uint64_t>(b);
      result[i] = static_cast<std::int64_t>(multiplies_ ? left * right : left + right);
    }
  }

 private:
  static std::int64_t at(const Tensor& x, const Tensor& y, std::size_t index) {
    std::ptrdiff_t offset = 0;
    for (std::size_t axis = y.axes; axis-- > 0;) {
      const std::size_t place = index % y.shape[axis];
      index /= y.shape[axis];
      const std::size_t missing = y.axes - x.axes;
      if (axis >= missing && x.shape[axis - missing] != 1) offset += static_cast<std::ptrdiff_t>(place) * x.strides[axis - missing];
    }
    return x.as<const std::int64_t>()[offset];
  }

  std::int64_t number_;
  bool multiplies_ = false;
};

// Operands: x [B, S, F] float32, rows int64 [B, K], y [B, K, F]. y[b, k] = x[b, rows[b, k]].
class SelectRows : public Instruction {
 public:
  void run(const Tensor* operands, std::size_t) const override {
    const Tensor &x = operands[0], &rows = operands[1], &y = operands[2];
    for (std::size_t b = 0; b < y.shape[0]; ++b) {
      for (std::size_t k = 0; k < y.shape[1]; ++k) {
        const auto place = static_cast<std::ptrdiff_t>(b) * rows.strides[0] + static_cast<std::ptrdiff_t>(k) * rows.strides[1];
        const std::int64_t row = rows.as<const std::int64_t>()[place];
        if (row < 0 || static_cast<std::uint64_t>(row) >= x.shape[1]) {
          throw std::invalid_argument("row " + std::to_string(row) + " is not among " + std::to_string(x.shape[1]));
        }
        const float* from = x.as<const float>() + static_cast<std::ptrdiff_t>(b) * x.strides[0] + row * x.strides[1];
        float* to = y.as<float>() + (b * y.shape[1] + k) * y.shape[2];
        std::memcpy(to, from, y.shape[2] * sizeof(float));
      }
    }
  }
};

// Operands: condition bool, a and b float32, each of y's shape or broadcast to it; y. y = condition ? a : b.
class Where : public Instruction {
 public:
  Layout layout(std::size_t) const override { return Layout::kAny; }

  void run(const Tensor* operands, std::size_t) const override {
    const Tensor &condition = operands[0], &a = operands[1], &b = operands[2], &y = operands[3];
    const std::size_t columns = y.columns(), rows = columns == 0 ? 0 : y.size() / columns;
    const std::ptrdiff_t by_condition = step(condition, y), by_a = step(a, y), by_b = step(b, y);
    for (std::size_t row = 0; row < rows; ++row) {
      const bool* chooses = condition.as<const bool>() + at(condition, y, row);
      const float* left = a.as<const float>() + at(a, y, row);
      const float* right = b.as<const float>() + at(b, y, row);
      float* to = y.as<float>() + row * columns;
      const bool is_left = *chooses;
      if (by_condition == 0 && (is_left ? by_a : by_b) == 1) {
        std::memcpy(to, is_left ? left : right, columns * sizeof(float));
        continue;
      }
      for (std::size_t i = 0; i < columns; ++i) {
        const auto place = static_cast<std::ptrdiff_t>(i);
        to[i] = chooses[place * by_condition] ? left[place * by_a] : right[place * by_b];
      }
    }
  }

 private:
  // Along the last axis; 0 where it is broadcast.
  static std::ptrdiff_t step(const Tensor& x, const Tensor& y) {
    return x.axes == 0 || (x.columns() == 1 && y.columns() != 1) ? 0 : x.strides[x.axes - 1];
  }

  // Where a row of y, counted over all axes but the last, begins in x.
  static std::ptrdiff_t at(const Tensor& x, const Tensor& y, std::size_t row) {
    std::ptrdiff_t offset = 0;
    const std::size_t missing = y.axes - x.axes;
    for (std::size_t axis = y.axes == 0 ? 0 : y.axes - 1; axis-- > 0;) {
      const std::size_t place = row % y.shape[axis];
      row /= y.shape[axis];
      if (axis >= missing && x.shape[axis - missing] != 1) offset += static_cast<std::ptrdiff_t>(place) * x.strides[axis - missing];
    }
    return offset;
  }
};

}  // namespace

void bind_small(nb::module_& m) {
  nb::class_<Arange, Instruction>(m, "Arange", "y[i] = begin + i, int64.").def(nb::init<std::int64_t>(), "begin"_a);
  nb::class_<IntegerOperation, Instruction>(m, "IntegerOperation", "'add' or 'mul' of two int64 tensors, or one and a number.")
      .def(nb::init<std::string_view, std::int64_t>(), "name"_a, "number"_a = 0);
  nb::class_<SelectRows, Instruction>(m, "SelectRows", "y[b, k] = x[b, rows[b, k]].").def(nb::init<>());
  nb::class_<Where, Instruction>(m, "Where", "y = condition ? a : b, float32; operands broadcast.").def(nb::init<>());
}

}  // namespace graphwright
