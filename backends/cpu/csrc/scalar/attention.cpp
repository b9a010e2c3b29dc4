// Attention and softmax, one float at a time.
#include "activation.h"
#include "attention_kernels.h"

namespace graphwright::scalar {
namespace {

#include "floats_1.inc"

struct V : Floats {
  static constexpr int kRows = 2, kVectors = 4;
};

#include "math.inc"
#include "attention.inc"
#include "softmax.inc"

}  // namespace

extern const AttentionKernels attention;
const AttentionKernels attention = {
    .isa = "scalar", .scratch = Work::size, .run = run_attention, .combine = combine_attention, .softmax = softmax_rows};

}  // namespace graphwright::scalar
