#include "kron_linear.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "scratch.h"
#include "threads.h"

namespace graphwright {
namespace {

// Products worth a thread: about ten microseconds.
constexpr std::size_t kWorthwhile = std::size_t{1} << 18;

// The two products of a row, each cut by rows of its left factor: every value is the same however they are cut.
SmallProduct first_of(const KronWeights& w, const float* x, float* between) {
  if (w.b_first) return {x, w.b_columns, between, w.a2, w.b2, w.b1, 1.0F};
  return {w.a, x, between, w.a1, w.a2, w.b2, 1.0F};
}

SmallProduct second_of(const KronWeights& w, const float* between, float* values) {
  if (w.b_first) return {w.a, between, values, w.a1, w.a2, w.b1, w.factor};
  return {between, w.b_columns, values, w.a1, w.b2, w.b1, w.factor};
}

SmallProduct part_of(SmallProduct whole, std::size_t begin, std::size_t end) {
  whole.left += begin * whole.inner;
  whole.out += begin * whole.columns;
  whole.rows = end - begin;
  return whole;
}

std::size_t padded(std::size_t outputs) { return (outputs + kPanel - 1) / kPanel * kPanel; }

// One row, by all threads.
void run_row(const KronKernels& kernels, const KronWeights& w, const float* x, std::size_t row, const LinearOutput& y,
             std::size_t threads) {
  static thread_local std::vector<float> held, results;
  float *between = scratch(held, w.between()), *values = scratch(results, padded(w.outputs()));
  const SmallProduct first = first_of(w, x, between), second = second_of(w, between, values);
  const auto in_parts = [&](const SmallProduct& whole, const auto& work) {
    const std::size_t high = std::max<std::size_t>(1, (whole.rows + 4 * threads - 1) / (4 * threads));
    parallel_for((whole.rows + high - 1) / high, threads, [&](std::size_t index) {
      work(index * high, std::min(whole.rows, index * high + high));
    });
  };
  in_parts(first, [&](std::size_t begin, std::size_t end) { kernels.multiply(part_of(first, begin, end)); });
  in_parts(second, [&](std::size_t begin, std::size_t end) { kernels.multiply(part_of(second, begin, end)); });
  kernels.finish(y, values, row, 0, w.outputs());
}

}  // namespace

void run_kron_linear(const KernelTable& kernels, const KronWeights& weights, const float* x, std::size_t rows,
                     const LinearOutput& y, std::size_t threads) {
  const KronKernels& own = *kernels.kron_linear;
  threads = std::min(threads, 1 + rows * weights.products() / kWorthwhile);
  if (rows < threads) {
    for (std::size_t row = 0; row < rows; ++row) run_row(own, weights, x + row * weights.columns(), row, y, threads);
    return;
  }
  const std::size_t high = std::max<std::size_t>(1, rows / (8 * threads));
  parallel_for((rows + high - 1) / high, threads, [&](std::size_t index) {
    static thread_local std::vector<float> held, results;
    float *between = scratch(held, weights.between()), *values = scratch(results, padded(weights.outputs()));
    for (std::size_t row = index * high; row < std::min(rows, (index + 1) * high); ++row) {
      own.multiply(first_of(weights, x + row * weights.columns(), between));
      own.multiply(second_of(weights, between, values));
      own.finish(y, values, row, 0, weights.outputs());
    }
    // What went past the caches is seen by other threads only after this.
    if (y.past_caches) std::atomic_thread_fence(std::memory_order_seq_cst);
  });
}

}  // namespace graphwright
