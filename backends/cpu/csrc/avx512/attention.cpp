// Attention and softmax, 512-bit vectors.
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
#include "attention.inc"
#include "softmax.inc"

}  // namespace

extern const AttentionKernels attention;
const AttentionKernels attention = {
    .isa = "avx512", .scratch = Work::size, .run = run_attention, .combine = combine_attention, .softmax = softmax_rows};

}  // namespace graphwright::avx512
