// The values of a program, their sizes as expressions over symbols, and where they lie in memory once sizes are known.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "instruction.h"

namespace graphwright {

// A size as instructions of a small stack machine: an operation, and for the first two its operand.
enum class SizeOp : std::int64_t { kConstant, kSymbol, kAdd, kSubtract, kMultiply, kFloorDivide, kModulo, kMax, kMin };
using Size = std::vector<std::int64_t>;

std::int64_t evaluate(const Size& size, const std::vector<std::int64_t>& symbols);

struct Value {
  enum class Kind : std::uint8_t {
    kInput,     // given with each call
    kBound,     // given once for all calls: a cache
    kConstant,
    kBuffer,    // an instruction writes it
    kReshape,   // of `base`: the same values in another shape; copied where no strides give that
    kPermute,   // of `base`: its axes in the order `axes`
    kNarrow,    // of `base`: `length` places from `begin` on along `axis`
  };

  Kind kind = Kind::kBuffer;
  Element element = Element::kFloat;
  std::vector<Size> shape{};   // of inputs, bound ones, buffers and reshapes
  Tensor constant{};
  std::size_t base = 0;
  std::vector<std::size_t> axes{};
  std::size_t axis = 0;
  Size begin{}, length{};
  std::size_t made_at = 0;     // instructions there were before it
};

inline constexpr std::size_t kAbsent = SIZE_MAX;

struct Step {
  const Instruction* instruction;
  std::vector<std::size_t> operands;  // values, or kAbsent
  std::size_t inputs;                 // so many of them are read; the others are written
};

struct Steps {
  std::size_t symbols = 0;
  std::vector<Value> values;
  std::vector<Step> steps;
  std::vector<std::size_t> outputs;
};

// One call of an instruction, or a copy where `instruction` is null.
struct PlannedCall {
  const Instruction* instruction;
  std::size_t step;         // whose it is
  std::size_t first;        // of its operands in Plan::operands
};

// Where everything is for given sizes. Addresses are those of the arena it was made for.
struct Plan {
  std::vector<std::int64_t> symbols;
  std::vector<PlannedCall> calls;
  std::vector<Tensor> operands;
  std::vector<Tensor> inputs;   // where the inputs of a call are copied to, by value
  std::vector<Tensor> outputs;
  std::size_t bytes = 0;        // of the arena
};

// `bound` has the tensors of values of that kind, by value. Without an arena only `bytes` is right.
Plan make_plan(const Steps& steps, const std::vector<std::int64_t>& symbols, const std::vector<Tensor>& bound,
               std::uint8_t* arena);

// Copies values from any strides to any strides; shapes and elements are the same.
void copy_tensor(const Tensor& from, const Tensor& to);

}  // namespace graphwright
