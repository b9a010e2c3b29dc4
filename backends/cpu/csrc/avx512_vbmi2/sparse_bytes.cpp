// Sparse codes in 512-bit vectors: a word of the mask is a vector, for one row and a few in registers.
#include <immintrin.h>

#include "sparse_linear_kernels.h"

namespace graphwright::avx512_vbmi2 {
namespace {

#include "vectors_512.inc"

struct V : Vectors {
  // GCC 12 copies the sums around the intrinsic, twice for each product.
  static Int dot(Int acc, Int w, Int x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
  }
  // Into `fill`: the form that clears by itself waits for its target's old value on some CPUs.
  static Int expand(Int fill, std::uint64_t mask, Int values) { return _mm512_mask_expand_epi8(fill, mask, values); }
  // Of small numbers, one to a lane.
  static Int each_byte(Int v) { return _mm512_mullo_epi32(v, _mm512_set1_epi32(0x01010101)); }
  static void prefetch_near(const std::uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
};

#include "math.inc"
#include "epilogue.inc"

struct S {
  // Codes as they are stored, from the lowest byte on; 4-bit ones as bytes.
  template <bool kInt4>
  static __m512i load(const std::uint8_t* values) {
    if constexpr (!kInt4) return _mm512_loadu_si512(values);
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
    // (wide | wide << 4) & 15 of every byte.
    return _mm512_ternarylogic_epi32(wide, _mm512_slli_epi16(wide, 4), _mm512_set1_epi8(15), 0xA8);
  }
  template <bool kInt4>
  static std::size_t taken(std::uint64_t mask) {
    const auto count = static_cast<std::size_t>(_mm_popcnt_u64(mask));
    return kInt4 ? (count + 1) / 2 : count;
  }
  template <bool kInt4>
  static std::size_t expand(const std::uint8_t* values, std::uint64_t mask, const std::uint8_t* fill, std::uint8_t raise,
                            std::uint8_t* to) {
    const __m512i codes = _mm512_add_epi8(load<kInt4>(values), _mm512_set1_epi8(static_cast<char>(raise)));
    _mm512_storeu_si512(to, V::expand(_mm512_loadu_si512(fill), mask, codes));
    return taken<kInt4>(mask);
  }
};

#include "sparse_bytes.inc"
#include "sparse_few.inc"

}  // namespace

extern const SparseByteKernels sparse_bytes;
const SparseByteKernels sparse_bytes = {
    .isa = "avx512_vbmi2", .expand = expand, .few = sparse_few, .few_rows = kFewSparseRows};

}  // namespace graphwright::avx512_vbmi2
