#include "plan.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace graphwright {
namespace {

constexpr std::size_t kAlignment = 64;

std::int64_t floor_divide(std::int64_t a, std::int64_t b) {
  if (b == 0) throw std::invalid_argument("a size is divided by zero");
  const std::int64_t quotient = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? quotient - 1 : quotient;
}

void make_contiguous(Tensor& tensor) {
  std::ptrdiff_t stride = 1;
  for (std::size_t axis = tensor.axes; axis-- > 0;) {
    tensor.strides[axis] = stride;
    stride *= static_cast<std::ptrdiff_t>(tensor.shape[axis]);
  }
}

bool has_layout(const Tensor& tensor, Layout wanted) {
  if (wanted == Layout::kAny || tensor.axes == 0 || tensor.size() == 0) return true;
  const std::size_t last = tensor.axes - 1;
  if (tensor.shape[last] != 1 && tensor.strides[last] != 1) return false;
  if (wanted == Layout::kLastAxis) return true;
  // Each axis must continue where the one behind it ends; for rows the distance of the first that counts is free.
  bool is_free = wanted == Layout::kRows;
  auto expected = static_cast<std::ptrdiff_t>(tensor.shape[last]);
  for (std::size_t axis = last; axis-- > 0;) {
    if (tensor.shape[axis] == 1) continue;
    if (is_free) expected = tensor.strides[axis];
    else if (tensor.strides[axis] != expected) return false;
    is_free = false;
    expected *= static_cast<std::ptrdiff_t>(tensor.shape[axis]);
  }
  return true;
}

// Strides that give `to`'s shape to `from`'s values where they lie, if there are any.
bool reshaped(const Tensor& from, Tensor& to) {
  if (from.size() == 0 || from.axes == 0) {
    make_contiguous(to);
    return true;
  }
  // From the back: axes of `from` that continue one another are a run, and whole axes of `to` must fill it.
  std::size_t next = to.axes, run = 1, filled = 1;
  std::ptrdiff_t step = from.strides[from.axes - 1];
  for (std::size_t axis = from.axes; axis-- > 0;) {
    run *= from.shape[axis];
    const bool goes_on = axis > 0 && (from.shape[axis - 1] == 1 ||
                                      from.strides[axis - 1] == static_cast<std::ptrdiff_t>(run) * step);
    if (goes_on) continue;
    while (next > 0 && (filled < run || to.shape[next - 1] == 1)) {
      --next;
      to.strides[next] = static_cast<std::ptrdiff_t>(filled) * step;
      filled *= to.shape[next];
    }
    if (filled != run) return false;
    if (axis > 0) step = from.strides[axis - 1];
    run = filled = 1;
  }
  return next == 0;
}

struct Piece {
  std::size_t size, first, last, offset;
};

// Offsets such that pieces that are needed at the same time do not overlap: the greatest first, each as low as it goes.
std::size_t place(std::vector<Piece>& pieces) {
  std::vector<std::size_t> order(pieces.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return pieces[a].size > pieces[b].size; });
  std::vector<std::size_t> placed;  // in ascending order of their offsets
  std::size_t total = 0;
  for (const std::size_t index : order) {
    Piece& piece = pieces[index];
    std::size_t offset = 0;
    for (const std::size_t other : placed) {
      const Piece& there = pieces[other];
      if (there.last < piece.first || piece.last < there.first) continue;
      if (offset + piece.size <= there.offset) break;
      offset = std::max(offset, there.offset + there.size);
    }
    piece.offset = offset;
    total = std::max(total, offset + piece.size);
    const auto at = std::upper_bound(placed.begin(), placed.end(), offset,
                                     [&](std::size_t value, std::size_t other) { return value < pieces[other].offset; });
    placed.insert(at, index);
  }
  return total;
}

class Planner {
 public:
  Planner(const Steps& steps, const std::vector<std::int64_t>& symbols, const std::vector<Tensor>& bound)
      : steps_(steps), symbols_(symbols), bound_(bound), tensors_(steps.values.size()), piece_(steps.values.size(), kAbsent) {}

  Plan plan(std::uint8_t* arena) {
    Plan plan;
    plan.symbols = symbols_;
    std::size_t next = 0;
    for (std::size_t step = 0; step < steps_.steps.size(); ++step) {
      while (next < steps_.values.size() && steps_.values[next].made_at <= step) define(next++, step, plan);
      add_step(step, plan);
    }
    while (next < steps_.values.size()) define(next++, steps_.steps.size(), plan);
    for (const std::size_t output : steps_.outputs) {
      use(output, SIZE_MAX);
      plan.outputs.push_back(tensors_[output]);
      output_pieces_.push_back(piece_of(output));
    }
    plan.bytes = place(pieces_);
    if (arena == nullptr) return plan;
    for (std::size_t i = 0; i < plan.operands.size(); ++i) locate(plan.operands[i], operand_pieces_[i], arena);
    for (std::size_t i = 0; i < plan.outputs.size(); ++i) locate(plan.outputs[i], output_pieces_[i], arena);
    plan.inputs.resize(tensors_.size());
    for (std::size_t value = 0; value < tensors_.size(); ++value) {
      if (steps_.values[value].kind != Value::Kind::kInput) continue;
      plan.inputs[value] = tensors_[value];
      locate(plan.inputs[value], piece_[value], arena);
    }
    return plan;
  }

 private:
  // Until places are known `data` of what lies in the arena counts bytes from the beginning of its piece.
  void locate(Tensor& tensor, std::size_t piece, std::uint8_t* arena) const {
    if (piece == kAbsent) return;
    tensor.data = arena + pieces_[piece].offset + reinterpret_cast<std::uintptr_t>(tensor.data);
  }

  std::size_t piece_of(std::size_t value) const { return piece_[value]; }

  void add_piece(std::size_t value, std::size_t first) {
    const std::size_t bytes = tensors_[value].size() * bytes_of(tensors_[value].element);
    piece_[value] = pieces_.size();
    pieces_.push_back({std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment), first, first, 0});
  }

  void use(std::size_t value, std::size_t step) {
    const std::size_t piece = piece_[value];
    if (piece != kAbsent) pieces_[piece].last = std::max(pieces_[piece].last, step);
  }

  void shape(std::size_t value) {
    const Value& given = steps_.values[value];
    Tensor& tensor = tensors_[value];
    tensor.element = given.element;
    tensor.axes = given.shape.size();
    for (std::size_t axis = 0; axis < tensor.axes; ++axis) {
      const std::int64_t size = evaluate(given.shape[axis], symbols_);
      if (size < 0) throw std::invalid_argument("a size is negative");
      tensor.shape[axis] = static_cast<std::size_t>(size);
    }
    make_contiguous(tensor);
  }

  void define(std::size_t value, std::size_t step, Plan& plan) {
    const Value& given = steps_.values[value];
    Tensor& tensor = tensors_[value];
    switch (given.kind) {
      case Value::Kind::kConstant: tensor = given.constant; break;
      case Value::Kind::kBound: tensor = bound_[value]; break;
      case Value::Kind::kInput:
        shape(value);
        add_piece(value, 0);
        break;
      case Value::Kind::kBuffer:
        shape(value);
        add_piece(value, step);
        break;
      case Value::Kind::kReshape: reshape(value, step, plan); break;
      case Value::Kind::kPermute: {
        const Tensor& base = tensors_[given.base];
        tensor = base;
        for (std::size_t axis = 0; axis < base.axes; ++axis) {
          tensor.shape[axis] = base.shape[given.axes[axis]];
          tensor.strides[axis] = base.strides[given.axes[axis]];
        }
        piece_[value] = piece_[given.base];
        break;
      }
      case Value::Kind::kNarrow: {
        tensor = tensors_[given.base];
        const auto begin = evaluate(given.begin, symbols_), length = evaluate(given.length, symbols_);
        if (begin < 0 || length < 0 || static_cast<std::size_t>(begin + length) > tensor.shape[given.axis]) {
          throw std::invalid_argument("a slice lies outside its tensor");
        }
        tensor.shape[given.axis] = static_cast<std::size_t>(length);
        const std::ptrdiff_t bytes = begin * tensor.strides[given.axis] * static_cast<std::ptrdiff_t>(bytes_of(tensor.element));
        tensor.data = reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(tensor.data) + static_cast<std::uintptr_t>(bytes));
        piece_[value] = piece_[given.base];
        break;
      }
    }
  }

  void reshape(std::size_t value, std::size_t step, Plan& plan) {
    const Value& given = steps_.values[value];
    const Tensor& base = tensors_[given.base];
    shape(value);
    Tensor& tensor = tensors_[value];
    if (tensor.size() != base.size()) throw std::invalid_argument("a reshape changes how many values there are");
    tensor.data = base.data;
    if (reshaped(base, tensor)) {
      piece_[value] = piece_[given.base];
      return;
    }
    make_contiguous(tensor);
    tensor.data = nullptr;
    add_piece(value, step);
    // Copied in the base's shape, whose contiguous order is this one's too.
    Tensor target = base;
    target.data = nullptr;
    make_contiguous(target);
    add_copy(given.base, base, target, piece_[value], step, plan);
  }

  void add_copy(std::size_t from, const Tensor& source, const Tensor& target, std::size_t piece, std::size_t step, Plan& plan) {
    use(from, step);
    pieces_[piece].last = std::max(pieces_[piece].last, step);
    plan.calls.push_back({nullptr, step, plan.operands.size()});
    plan.operands.push_back(source);
    plan.operands.push_back(target);
    operand_pieces_.push_back(piece_[from]);
    operand_pieces_.push_back(piece);
  }

  void add_step(std::size_t index, Plan& plan) {
    const Step& step = steps_.steps[index];
    std::vector<Tensor> operands;
    std::vector<std::size_t> pieces;
    for (std::size_t place = 0; place < step.operands.size(); ++place) {
      const std::size_t value = step.operands[place];
      if (value == kAbsent) {
        operands.push_back(Tensor{});
        pieces.push_back(kAbsent);
        continue;
      }
      use(value, index);
      Tensor tensor = tensors_[value];
      std::size_t piece = piece_[value];
      if (place < step.inputs && !has_layout(tensor, step.instruction->layout(place))) {
        Tensor target = tensor;
        target.data = nullptr;
        make_contiguous(target);
        piece = pieces_.size();
        const std::size_t bytes = target.size() * bytes_of(target.element);
        pieces_.push_back({(bytes + kAlignment - 1) / kAlignment * kAlignment, index, index, 0});
        add_copy(value, tensor, target, piece, index, plan);
        tensor = target;
      }
      operands.push_back(tensor);
      pieces.push_back(piece);
    }
    plan.calls.push_back({step.instruction, index, plan.operands.size()});
    plan.operands.insert(plan.operands.end(), operands.begin(), operands.end());
    operand_pieces_.insert(operand_pieces_.end(), pieces.begin(), pieces.end());
  }

  const Steps& steps_;
  const std::vector<std::int64_t>& symbols_;
  const std::vector<Tensor>& bound_;
  std::vector<Tensor> tensors_;          // by value
  std::vector<std::size_t> piece_;       // by value; kAbsent for what does not lie in the arena
  std::vector<Piece> pieces_;
  std::vector<std::size_t> operand_pieces_, output_pieces_;
};

}  // namespace

std::int64_t evaluate(const Size& size, const std::vector<std::int64_t>& symbols) {
  std::int64_t stack[16];
  std::size_t top = 0;
  for (std::size_t at = 0; at < size.size(); ++at) {
    const auto op = static_cast<SizeOp>(size[at]);
    if (op == SizeOp::kConstant || op == SizeOp::kSymbol) {
      if (top == 16) throw std::invalid_argument("a size is too long an expression");
      const std::int64_t operand = size.at(++at);
      stack[top++] = op == SizeOp::kConstant ? operand : symbols.at(static_cast<std::size_t>(operand));
      continue;
    }
    if (top < 2) throw std::invalid_argument("a size is no expression");
    const std::int64_t b = stack[--top], a = stack[top - 1];
    std::int64_t& result = stack[top - 1];
    switch (op) {
      case SizeOp::kAdd: result = a + b; break;
      case SizeOp::kSubtract: result = a - b; break;
      case SizeOp::kMultiply: result = a * b; break;
      case SizeOp::kFloorDivide: result = floor_divide(a, b); break;
      case SizeOp::kModulo: result = a - floor_divide(a, b) * b; break;
      case SizeOp::kMax: result = std::max(a, b); break;
      case SizeOp::kMin: result = std::min(a, b); break;
      default: throw std::invalid_argument("a size is no expression");
    }
  }
  if (top != 1) throw std::invalid_argument("a size is no expression");
  return stack[0];
}

Plan make_plan(const Steps& steps, const std::vector<std::int64_t>& symbols, const std::vector<Tensor>& bound,
               std::uint8_t* arena) {
  return Planner(steps, symbols, bound).plan(arena);
}

void copy_tensor(const Tensor& from, const Tensor& to) {
  const std::size_t bytes = bytes_of(from.element);
  if (from.size() == 0) return;
  const bool is_row = from.axes > 0 && from.strides[from.axes - 1] == 1 && to.strides[to.axes - 1] == 1;
  const std::size_t inner = is_row ? from.shape[from.axes - 1] : 1;
  const std::size_t outer_axes = is_row ? from.axes - 1 : from.axes;
  std::size_t at[kMostAxes]{};
  for (;;) {
    std::ptrdiff_t source = 0, target = 0;
    for (std::size_t axis = 0; axis < outer_axes; ++axis) {
      source += static_cast<std::ptrdiff_t>(at[axis]) * from.strides[axis];
      target += static_cast<std::ptrdiff_t>(at[axis]) * to.strides[axis];
    }
    const auto step = static_cast<std::ptrdiff_t>(bytes);
    std::memcpy(static_cast<std::uint8_t*>(to.data) + target * step, static_cast<const std::uint8_t*>(from.data) + source * step,
                inner * bytes);
    std::size_t axis = outer_axes;
    while (axis > 0 && ++at[axis - 1] == from.shape[axis - 1]) at[--axis] = 0;
    if (axis == 0) return;
  }
}

}  // namespace graphwright
