// One decoding step of attention: queries and keys are turned, keys and values go into the caches, queries attend.
#pragma once

#include <cstddef>
#include <vector>

#include "attention_kernels.h"
#include "instruction.h"

namespace graphwright {

// See ir/ops/cache.py for what is computed. The caches are written in place, all else but the output is only read. What
// the caches hold beyond a row's last token may be anything.
class DecoderAttention final : public Instruction {
 public:
  // Floats may have any strides but for the last axis, which is contiguous; so may the caches.
  enum Operand : std::size_t {
    kQuery,        // float [B, Hq, S, D]
    kKey,          // float [B, Hkv, S, D]
    kValue,        // float [B, Hkv, S, Dv]
    kCos,          // float [B or 1, S, R], R <= D even; no data: nothing is turned
    kSin,          // like cos
    kKeys,         // float, bf16 or int8 [N, Hkv, C, D]
    kValues,       // of the same element, [N, Hkv, C, Dv]
    kKeyScales,    // float [N, Hkv, C], of any strides; no data unless caches are int8
    kValueScales,  // the same
    kSlots,        // int64 [B], distinct
    kStarts,       // int64 [B]
    kOutput,       // float [B, Hq, S, Dv]
    kOperands,
  };

  // A window or softcap of 0 is none; slopes are empty or [Hq].
  DecoderAttention(const AttentionKernels& kernels, float scale, std::ptrdiff_t window, float softcap,
                   std::vector<float> slopes, bool interleaved);

  const char* isa() const { return kernels_.isa; }

  // Throws std::invalid_argument where a slot is not in the cache or given twice, or a position is not in the cache.
  void run(const Tensor* operands, std::size_t threads) const override;

 private:
  struct Step;

  Attention attention(const Step& step, std::size_t row) const;
  void append(const Step& step, std::size_t row, std::size_t head, std::size_t begin, std::size_t end,
              float* scratch) const;
  void run_few(const Step& step, std::size_t threads) const;
  void run_many(const Step& step, std::size_t threads) const;

  AttentionKernels kernels_;
  float scale_;
  std::ptrdiff_t window_;
  float softcap_;
  std::vector<float> slopes_;
  bool interleaved_;
};

}  // namespace graphwright
