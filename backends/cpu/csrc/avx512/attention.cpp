// Attention, its caches and softmax, 512-bit vectors.
#include <immintrin.h>

#include "activation.h"
#include "attention_kernels.h"

namespace graphwright::avx512 {
namespace {

#include "floats_512.inc"

struct V : Floats {
  static constexpr int kRows = 6, kVectors = 4;
};

#include "math.inc"
#include "row_loads.inc"
#include "rotary_pairs.inc"
#include "attention.inc"
#include "softmax.inc"
#include "row_codes.inc"
#include "round_floats.inc"
#include "cache_rows.inc"

}  // namespace

extern const AttentionKernels attention;
const AttentionKernels attention = {
    .isa = "avx512", .scratch = Work::size, .run = run_attention, .combine = combine_attention, .append = append_rows,
    .softmax = softmax_rows};

}  // namespace graphwright::avx512
