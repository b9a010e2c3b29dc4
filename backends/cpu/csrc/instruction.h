// What the executor runs: a kernel with its constants, called on tensors whose places and sizes it is told.
#pragma once

#include <cstddef>
#include <cstdint>

namespace graphwright {

enum class Element : std::uint8_t { kFloat, kBf16, kInt8, kInt64, kBool, kUint8 };

inline constexpr std::size_t kMostAxes = 6;

struct Tensor {
  void* data;  // null for an operand that is left out
  Element element;
  std::size_t axes;
  std::size_t shape[kMostAxes];
  std::ptrdiff_t strides[kMostAxes];  // in elements
};

class Instruction {
 public:
  virtual ~Instruction() = default;
  // Operands are the inputs and then the outputs, in the order that the class documents. Shapes have been checked when
  // the program was lowered; values have not. The GIL is not held. Must not allocate when called again with the same
  // shapes. Throws std::invalid_argument for values it cannot use.
  virtual void run(const Tensor* operands, std::size_t threads) const = 0;
};

}  // namespace graphwright
