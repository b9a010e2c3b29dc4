#include "sparse_gather.h"

#include <algorithm>
#include <array>

#include "sparse_linear.h"
#include "threads.h"

namespace graphwright {
namespace {

struct Weight {
  std::uint32_t column;
  std::int8_t code;
};

// The weights of a panel's outputs, from left to right, and how many of each have their slot.
struct Panel {
  std::array<std::vector<Weight>, kPanel> weights;
  std::array<std::size_t, kPanel> taken{};
};

Panel panel_of_codes(const std::uint8_t* codes, std::size_t steps, std::int32_t middle) {
  Panel panel;
  for (std::size_t step = 0; step < steps; ++step, codes += kStepBytes) {
    for (std::size_t i = 0; i < kStepBytes; ++i) {
      const std::int32_t code = std::int32_t{codes[i]} - middle;
      if (code == 0) continue;
      panel.weights[i / 4].push_back({static_cast<std::uint32_t>(step * 4 + i % 4), static_cast<std::int8_t>(code)});
    }
  }
  return panel;
}

struct Slots {
  std::vector<GatheredSlot> slots;
  std::vector<std::uint32_t> windows;
};

// The next window begins where the output does that is farthest behind, and ends within the columns where it can.
Slots slots_of(Panel& panel, std::size_t columns) {
  Slots found;
  const auto last = static_cast<std::uint32_t>(columns - std::min(columns, kWindow));
  for (;;) {
    auto begin = static_cast<std::uint32_t>(columns);
    for (std::size_t n = 0; n < kPanel; ++n) {
      if (panel.taken[n] < panel.weights[n].size()) begin = std::min(begin, panel.weights[n][panel.taken[n]].column);
    }
    if (begin == columns) return found;
    begin = std::min(begin, last);
    GatheredSlot slot{};
    for (std::size_t n = 0; n < kPanel; ++n) {
      for (std::size_t i = 0; i < 4 && panel.taken[n] < panel.weights[n].size(); ++i) {
        const Weight& weight = panel.weights[n][panel.taken[n]];
        if (weight.column >= begin + kWindow) break;
        slot.places[n * 4 + i] = static_cast<std::uint8_t>(weight.column - begin);
        slot.codes[n * 4 + i] = weight.code;
        ++panel.taken[n];
      }
    }
    found.slots.push_back(slot);
    found.windows.push_back(begin);
  }
}

}  // namespace

Gathered gather(const KernelTable& kernels, const SparseWeights& sparse, const PackedLinear& weights, std::size_t threads) {
  std::vector<Slots> panels(sparse.panels);
  parallel_for(sparse.panels, threads, [&](std::size_t index) {
    Panel panel = panel_of_codes(expanded(kernels, sparse, weights, index, 0), sparse.steps, weights.middle);
    panels[index] = slots_of(panel, sparse.steps * 4);
  });
  Gathered all;
  all.offsets.push_back(0);
  for (const Slots& each : panels) all.offsets.push_back(all.offsets.back() + each.slots.size());
  all.slots.reserve(all.offsets.back());
  all.windows.reserve(all.offsets.back());
  for (Slots& each : panels) {
    all.slots.insert(all.slots.end(), each.slots.begin(), each.slots.end());
    all.windows.insert(all.windows.end(), each.windows.begin(), each.windows.end());
    each = {};  // so that they are not all there twice
  }
  return all;
}

}  // namespace graphwright
