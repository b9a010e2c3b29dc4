// Products with sparse floats, in 512-bit vectors.
#include <immintrin.h>

#include "sparse_linear_kernels.h"

namespace graphwright::avx512 {
namespace {

#include "codes_512.inc"

struct V : Codes {
  static constexpr int kRows = 6, kVectors = 4, kMostVectors = 4, kStreamed = 16;  // see float_linear.cpp
};

#include "math.inc"
#include "epilogue.inc"
#include "linear_floats.inc"

struct S {
  template <bool kBfloat16>
  static std::size_t expand(const std::uint8_t* values, std::uint64_t mask, float* to) {
    std::size_t taken = 0;
    for (unsigned lane = 0; lane < 64; lane += 16) {
      const auto sixteen = static_cast<__mmask16>(mask >> lane);
      const std::uint8_t* from = values + taken;
      const V::Float found = kBfloat16 ? V::load_bf16(reinterpret_cast<const std::uint16_t*>(from))
                                       : V::load_float(reinterpret_cast<const float*>(from));
      // Into a vector of zeros: the form that clears by itself waits for its target's old value on some CPUs.
      V::store(to + lane, _mm512_mask_expand_ps(V::zero_float(), sixteen, found));
      taken += static_cast<std::size_t>(__builtin_popcount(sixteen)) * (kBfloat16 ? 2 : 4);
    }
    return taken;
  }
};

#include "sparse_floats.inc"

}  // namespace

extern const SparseFloatKernels sparse_floats_kernels;
const SparseFloatKernels sparse_floats_kernels = {.isa = "avx512", .run = sparse_floats};

}  // namespace graphwright::avx512
