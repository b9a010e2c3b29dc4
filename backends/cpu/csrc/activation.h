// The elementwise functions that kernels offer, alone (pointwise kernels) or at the end of a linear. Plain data.
#pragma once

#include <cstdint>

namespace graphwright {

enum class Activation : std::uint8_t { kNone, kRelu, kSilu, kGelu, kGeluTanh, kTanh, kSigmoid };

}  // namespace graphwright
