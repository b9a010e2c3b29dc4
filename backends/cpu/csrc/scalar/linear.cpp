// The integer product, in plain C++: what every other file must compute, to the last bit.
#include "linear_kernels.h"

namespace graphwright::scalar {
namespace {

#include "floats_1.inc"

struct V : Floats {};

#include "math.inc"
#include "epilogue.inc"

// The code of a column for an output of a panel.
std::int32_t code_of(const PackedLinear& w, std::size_t panel, std::size_t output, std::size_t column) {
  const auto bits = static_cast<std::size_t>(w.bits), columns = 32 / bits, steps = w.groups * w.group / columns;
  const std::uint8_t* dword = w.codes + ((panel * steps + column / columns) * kPanel + output) * 4;
  const std::size_t place = column % columns;
  return (dword[place % 4] >> (place / 4 * bits)) & ((1 << bits) - 1);
}

void linear_bytes(const PackedLinear& w, const ByteRows& x, const LinearOutput& y, const LinearBlock& block) {
  for (std::size_t panel = block.panel_begin; panel < block.panel_end; ++panel) {
    for (std::size_t row = block.row_begin; row < block.row_end; ++row) {
      for (std::size_t n = 0; n < kPanel && panel * kPanel + n < w.outputs; ++n) {
        const std::size_t output = panel * kPanel + n;
        float sum = 0.0F;
        for (std::size_t g = 0; g < w.groups; ++g) {
          const std::size_t place = (panel * w.groups + g) * kPanel + n;
          std::int32_t acc = -(w.zeros == nullptr ? w.middle : w.zeros[place]) * x.sums[row * w.groups + g];
          if (x.shifts != nullptr) acc -= w.sums[output] * x.shifts[row];
          for (std::size_t i = 0; i < w.group; ++i) {
            const std::size_t column = g * w.group + i;
            acc += code_of(w, panel, n, column) * x.codes[row * w.groups * w.group + column];
          }
          const float scale = w.half_scales ? V::load_half(static_cast<const std::uint16_t*>(w.scales) + place)
                                            : static_cast<const float*>(w.scales)[place];
          const float own = x.scale_per_group ? x.scales[row * w.groups + g] : x.scales[row];
          sum = __builtin_fmaf(static_cast<float>(acc), scale * own, sum);
        }
        write(y, {&sum, row, 1, output, 1});
      }
    }
  }
}

}  // namespace

extern const ByteLinear byte_linear;
const ByteLinear byte_linear = {.isa = "scalar", .run = linear_bytes};

}  // namespace graphwright::scalar
