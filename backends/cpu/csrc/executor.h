// Runs a program's instructions in memory that was planned beforehand.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <vector>

#include "plan.h"

namespace graphwright {

// Aligned memory that is not touched before it is used.
class Arena {
 public:
  std::uint8_t* data() const { return data_.get(); }
  std::size_t size() const { return size_; }
  void reserve(std::size_t bytes);

 private:
  struct Free {
    void operator()(std::uint8_t* data) const;
  };
  std::unique_ptr<std::uint8_t, Free> data_;
  std::size_t size_ = 0;
};

// The state of one caller: bound tensors, memory, and the plans of the sizes that came lately. One call at a time.
class Runner {
 public:
  explicit Runner(const Steps& steps);

  void bind(std::size_t value, const Tensor& tensor);

  // `inputs` are those of kind kInput, in order, contiguous. The outputs, which the next call overwrites.
  // Where `nanoseconds` is not null, the time of each step is added to it.
  const std::vector<Tensor>& run(const std::vector<Tensor>& inputs, std::size_t threads, std::uint64_t* nanoseconds);

  // Makes a call that is running end before its next instruction, by throwing Cancelled.
  void cancel() { cancelled_.store(true); }

  std::size_t arena_bytes() const { return arena_.size(); }
  std::size_t plans() const { return plans_.size(); }

 private:
  const Plan& plan_for(const std::vector<Tensor>& inputs);

  const Steps& steps_;
  std::vector<std::size_t> inputs_, bound_values_;  // values of these kinds
  std::vector<Tensor> bound_;
  std::vector<std::int64_t> bound_symbols_;  // empty until all are bound; -1 where none says the size
  std::vector<std::unique_ptr<Plan>> plans_;  // the latest first
  std::vector<std::int64_t> symbols_;
  Arena arena_;
  std::atomic<bool> cancelled_{false};
};

struct Cancelled : std::exception {
  const char* what() const noexcept override { return "the step was cancelled"; }
};

}  // namespace graphwright
