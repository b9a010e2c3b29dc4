// Memory that a thread keeps from call to call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace graphwright {

// So many floats, aligned to 64 bytes. It grows to what the largest call asked for; what it held may be lost.
inline float* scratch(std::vector<float>& held, std::size_t size) {
  constexpr std::size_t kAlign = 64 / sizeof(float);
  if (held.size() < size + kAlign) held.resize(size + kAlign);
  const auto past = reinterpret_cast<std::uintptr_t>(held.data()) / sizeof(float) % kAlign;
  return held.data() + (kAlign - past) % kAlign;
}

}  // namespace graphwright
