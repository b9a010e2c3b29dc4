// Sparse codes as dense ones, one at a time: what every other file must compute.
#include "sparse_linear_kernels.h"

namespace graphwright::scalar {
namespace {

struct S {
  template <bool kInt4>
  static std::size_t expand(const std::uint8_t* values, const std::uint64_t* masks, const std::uint8_t* fill,
                            std::uint8_t raise, std::uint8_t* to) {
    std::size_t counts[2] = {0, 0};
    for (unsigned i = 0; i < 128; ++i) {
      to[i] = fill[i];
      const unsigned word = i / 64;
      if (((masks[word] >> (i % 64)) & 1U) == 0) continue;
      const std::uint8_t byte = values[kInt4 ? counts[word] : counts[0] + counts[1]];
      to[i] = static_cast<std::uint8_t>((kInt4 ? (byte >> (4 * word)) & 15U : byte) + raise);
      ++counts[word];
    }
    if (!kInt4) return counts[0] + counts[1];
    return counts[0] > counts[1] ? counts[0] : counts[1];
  }
};

#include "sparse_bytes.inc"

}  // namespace

extern const SparseByteKernels sparse_bytes;
const SparseByteKernels sparse_bytes = {.isa = "scalar",
                                        .expand = expand,
                                        .few = nullptr,
                                        .few_rows = 0,
                                        .gathered = nullptr,
                                        .blocked = nullptr,
                                        .turn = nullptr,
                                        .lanes = 0,
                                        .blocked_rows = 0};

}  // namespace graphwright::scalar
