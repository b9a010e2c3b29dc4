// Sparse codes as dense ones, one at a time: what every other file must compute.
#include "sparse_linear_kernels.h"

namespace graphwright::scalar {
namespace {

struct S {
  template <bool kInt4>
  static std::size_t expand(const std::uint8_t* values, std::uint64_t mask, const std::uint8_t* fill, std::uint8_t raise,
                            std::uint8_t* to) {
    std::size_t count = 0;
    for (unsigned i = 0; i < 64; ++i) {
      to[i] = fill[i];
      if (((mask >> i) & 1U) == 0) continue;
      const unsigned code = kInt4 ? (values[count / 2] >> (4 * (count % 2))) & 15U : values[count];
      to[i] = static_cast<std::uint8_t>(code + raise);
      ++count;
    }
    return kInt4 ? (count + 1) / 2 : count;
  }
};

#include "sparse_bytes.inc"

}  // namespace

extern const SparseByteKernels sparse_bytes;
const SparseByteKernels sparse_bytes = {.isa = "scalar", .expand = expand, .few = nullptr, .few_rows = 0};

}  // namespace graphwright::scalar
