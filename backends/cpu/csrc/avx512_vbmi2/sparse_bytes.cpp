// Sparse codes in 512-bit vectors: a word of the mask is a vector, for one row and a few in registers. With many rows each
// output has columns of its own, picked out of a vector of the row, or blocks of its own that meet vectors of rows.
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
  // The bytes of `from` at these places, each in 0..63.
  static Int pick(Int places, Int from) { return _mm512_permutexvar_epi8(places, from); }
  static Int as_codes(Float v) { return _mm512_castps_si512(v); }
  static Int raise(Int v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }  // by 128
  static void store_codes(std::uint8_t* p, Int v) { _mm512_storeu_si512(p, v); }
  static void prefetch_near(const std::uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
};

#include "math.inc"
#include "epilogue.inc"

struct S {
  // The codes of two words as they are stored, from the lowest byte on, and how many bytes of values that took.
  template <bool kInt4>
  static std::size_t load(const std::uint8_t* values, const std::uint64_t* masks, __m512i (&codes)[2]) {
    const auto first = static_cast<std::size_t>(_mm_popcnt_u64(masks[0]));
    const auto second = static_cast<std::size_t>(_mm_popcnt_u64(masks[1]));
    codes[0] = _mm512_loadu_si512(values);
    if constexpr (!kInt4) {
      codes[1] = _mm512_loadu_si512(values + first);
      return first + second;
    }
    codes[1] = V::high4(codes[0]);
    codes[0] = V::low4(codes[0]);
    return first > second ? first : second;
  }

  template <bool kInt4>
  static std::size_t expand(const std::uint8_t* values, const std::uint64_t* masks, const std::uint8_t* fill,
                            std::uint8_t raise, std::uint8_t* to) {
    __m512i codes[2];
    const std::size_t taken = load<kInt4>(values, masks, codes);
    for (int word = 0; word < 2; ++word) {
      const __m512i raised = _mm512_add_epi8(codes[word], _mm512_set1_epi8(static_cast<char>(raise)));
      _mm512_storeu_si512(to + word * 64, V::expand(_mm512_loadu_si512(fill + word * 64), masks[word], raised));
    }
    return taken;
  }
};

#include "sparse_bytes.inc"
#include "sparse_few.inc"
#include "sparse_gathered.inc"
#include "sparse_blocked.inc"

#undef GRAPHWRIGHT_UNROLL

}  // namespace

extern const SparseByteKernels sparse_bytes;
const SparseByteKernels sparse_bytes = {.isa = "avx512_vbmi2",
                                        .expand = expand,
                                        .few = sparse_few,
                                        .few_rows = kFewSparseRows,
                                        .gathered = gathered,
                                        .blocked = blocked,
                                        .turn = turn_codes,
                                        .lanes = V::kLanes,
                                        .blocked_rows = kBlockedVectors * V::kLanes};

}  // namespace graphwright::avx512_vbmi2
