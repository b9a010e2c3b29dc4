#include "executor.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace graphwright {
namespace {

// Decoding alternates between few sizes; prompts come in any, and each plan is made in less than a millisecond.
constexpr std::size_t kMostPlans = 16;
constexpr std::align_val_t kAlignment{64};

void set_symbol(std::int64_t& symbol, std::size_t size) {
  const auto found = static_cast<std::int64_t>(size);
  if (symbol >= 0 && symbol != found) {
    throw std::invalid_argument("inputs differ in a size that must be the same: " + std::to_string(symbol) + " and " +
                                std::to_string(found));
  }
  symbol = found;
}

void check_shape(const Value& value, const Tensor& given, std::vector<std::int64_t>& symbols) {
  if (given.axes != value.shape.size() || given.element != value.element) {
    throw std::invalid_argument("an input has the wrong number of axes or dtype");
  }
  for (std::size_t axis = 0; axis < given.axes; ++axis) {
    const Size& size = value.shape[axis];
    if (static_cast<SizeOp>(size.at(0)) == SizeOp::kSymbol && size.size() == 2) {
      set_symbol(symbols.at(static_cast<std::size_t>(size[1])), given.shape[axis]);
    } else if (size.size() != 2 || size[1] != static_cast<std::int64_t>(given.shape[axis])) {
      throw std::invalid_argument("an input has the wrong shape");
    }
  }
}

}  // namespace

void Arena::Free::operator()(std::uint8_t* data) const { ::operator delete(data, kAlignment); }

void Arena::reserve(std::size_t bytes) {
  if (bytes <= size_) return;
  data_.reset();
  size_ = 0;
  data_.reset(static_cast<std::uint8_t*>(::operator new(bytes, kAlignment)));
  size_ = bytes;
}

Runner::Runner(const Steps& steps) : steps_(steps), bound_(steps.values.size()) {
  for (std::size_t value = 0; value < steps.values.size(); ++value) {
    if (steps.values[value].kind == Value::Kind::kInput) inputs_.push_back(value);
    if (steps.values[value].kind == Value::Kind::kBound) bound_values_.push_back(value);
  }
}

void Runner::bind(std::size_t value, const Tensor& tensor) {
  if (value >= bound_.size() || steps_.values[value].kind != Value::Kind::kBound) {
    throw std::invalid_argument("such a value is not bound");
  }
  plans_.clear();
  bound_symbols_.clear();
  bound_[value] = tensor;
}

const Plan& Runner::plan_for(const std::vector<Tensor>& inputs) {
  if (bound_symbols_.empty()) {
    std::vector<std::int64_t> found(steps_.symbols, -1);
    for (const std::size_t value : bound_values_) {
      if (bound_[value].data == nullptr) throw std::invalid_argument("a bound tensor is missing");
      check_shape(steps_.values[value], bound_[value], found);
    }
    bound_symbols_ = std::move(found);
  }
  symbols_ = bound_symbols_;
  if (inputs.size() < inputs_.size()) throw std::invalid_argument("inputs are missing");
  if (inputs.size() > inputs_.size()) throw std::invalid_argument("there are too many inputs");
  for (std::size_t i = 0; i < inputs.size(); ++i) check_shape(steps_.values[inputs_[i]], inputs[i], symbols_);
  const auto known = std::find_if(plans_.begin(), plans_.end(), [&](const auto& plan) { return plan->symbols == symbols_; });
  if (known != plans_.end()) {
    std::rotate(plans_.begin(), known, known + 1);
    return *plans_.front();
  }
  const std::size_t bytes = make_plan(steps_, symbols_, bound_, nullptr).bytes;
  if (bytes > arena_.size()) {
    plans_.clear();  // their addresses are those of the memory that goes
    arena_.reserve(bytes);
  }
  if (plans_.size() == kMostPlans) plans_.pop_back();
  plans_.insert(plans_.begin(), std::make_unique<Plan>(make_plan(steps_, symbols_, bound_, arena_.data())));
  return *plans_.front();
}

const std::vector<Tensor>& Runner::run(const std::vector<Tensor>& inputs, std::size_t threads, std::uint64_t* nanoseconds) {
  using Clock = std::chrono::steady_clock;
  cancelled_.store(false);
  const Plan& plan = plan_for(inputs);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const Tensor& given = inputs[i];
    if (given.size() != 0) std::memcpy(plan.inputs[inputs_[i]].data, given.data, given.size() * bytes_of(given.element));
  }
  for (const PlannedCall& call : plan.calls) {
    if (cancelled_.load(std::memory_order_relaxed)) throw Cancelled{};
    const Tensor* operands = plan.operands.data() + call.first;
    const auto begin = nanoseconds != nullptr ? Clock::now() : Clock::time_point{};
    if (call.instruction == nullptr) copy_tensor(operands[0], operands[1]);
    else call.instruction->run(operands, threads);
    if (nanoseconds != nullptr) {
      const auto spent = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count();
      nanoseconds[call.step] += static_cast<std::uint64_t>(spent);
    }
  }
  return plan.outputs;
}

}  // namespace graphwright
