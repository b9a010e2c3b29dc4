// What the executor runs: a kernel with its constants, called on tensors whose places and sizes it is told.
#pragma once

#include <cstddef>
#include <cstdint>

namespace graphwright {

enum class Element : std::uint8_t { kFloat, kBf16, kInt8, kInt64, kBool, kUint8 };

inline std::size_t bytes_of(Element element) {
  switch (element) {
    case Element::kFloat: return 4;
    case Element::kBf16: return 2;
    case Element::kInt64: return 8;
    default: return 1;
  }
}

inline constexpr std::size_t kMostAxes = 6;

struct Tensor {
  void* data;  // null for an operand that is left out
  Element element;
  std::size_t axes;
  std::size_t shape[kMostAxes];
  std::ptrdiff_t strides[kMostAxes];  // in elements

  std::size_t size() const {
    std::size_t product = 1;
    for (std::size_t axis = 0; axis < axes; ++axis) product *= shape[axis];
    return product;
  }
  std::size_t columns() const { return axes == 0 ? 1 : shape[axes - 1]; }
  std::size_t rows() const {
    std::size_t product = 1;
    for (std::size_t axis = 0; axis + 1 < axes; ++axis) product *= shape[axis];
    return product;
  }
  // From one row to the next, where Layout::kRows holds.
  std::ptrdiff_t row_stride() const {
    for (std::size_t axis = axes == 0 ? 0 : axes - 1; axis-- > 0;) {
      if (shape[axis] != 1) return strides[axis];
    }
    return static_cast<std::ptrdiff_t>(columns());
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// How an operand must lie in memory; one that does not is copied first.
enum class Layout : std::uint8_t {
  kAny,
  kLastAxis,    // values of the last axis are neighbours
  kRows,        // and rows, over all other axes, are at one distance
  kContiguous,
};

class Instruction {
 public:
  virtual ~Instruction() = default;
  // Of an input operand. Outputs are always as they were made: contiguous, or a view that the lowering chose.
  virtual Layout layout(std::size_t /*operand*/) const { return Layout::kLastAxis; }
  // Operands are the inputs and then the outputs, in the order that the class documents. Shapes have been checked when
  // the program was lowered; values have not. The GIL is not held. Must not allocate when called again with the same
  // shapes. Throws std::invalid_argument for values it cannot use.
  virtual void run(const Tensor* operands, std::size_t threads) const = 0;
};

}  // namespace graphwright
