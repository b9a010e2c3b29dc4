// How a linear rounds its activations, as Python gives it.
#pragma once

#include <string_view>
#include <vector>

#include "bindings.h"
#include "byte_linear.h"

namespace graphwright {

// A grid, and what is computed from it once.
class HeldGrid {
 public:
  HeldGrid() = default;

  // `columns` steps for a fixed grid, whose code of 0 is `zero`.
  HeldGrid(std::string_view rounding, std::optional<Array<const float>> steps, std::size_t columns, int zero)
      : steps_(std::move(steps)) {
    if (rounding == "symmetric") grid_.rounding = Rounding::kSymmetric;
    else if (rounding == "shifted") grid_.rounding = Rounding::kShifted;
    else if (rounding == "fixed") grid_.rounding = Rounding::kFixed;
    else throw std::invalid_argument("rounding must be symmetric, shifted or fixed");
    grid_.steps = data_of(steps_, columns, "steps has the wrong size");
    grid_.zero = zero;
    for (std::size_t column = 0; steps_ && column < columns; ++column) {
      const float inverse = 1.0F / grid_.steps[column];
      if (!(inverse > 1e-36F && inverse < 1e36F)) {
        inverses_.clear();
        break;
      }
      inverses_.push_back(inverse);
    }
    grid_.inverses = inverses_.empty() ? nullptr : inverses_.data();
    expect(grid_.rounding != Rounding::kFixed || (steps_.has_value() && zero >= 0 && zero <= 255), "a grid is needed");
  }

  // Codes have a shift, which comes in by sums of the weights.
  bool shifted() const { return grid_.rounding != Rounding::kSymmetric; }

  ActivationGrid grid() const { return grid_; }

 private:
  std::optional<Array<const float>> steps_;
  std::vector<float> inverses_;  // moved with its memory, so that what points to it stays good
  ActivationGrid grid_{Rounding::kSymmetric, nullptr, nullptr, 0};
};

}  // namespace graphwright
