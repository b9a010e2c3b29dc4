// Attention and softmax on all threads.
#pragma once

#include <cstddef>

#include "attention_kernels.h"

namespace graphwright {

// Results do not depend on the number of threads.
void run_attention(const AttentionKernels& kernels, const Attention& call, std::size_t threads);

// Of each row; rows lie one behind another.
void run_softmax(const AttentionKernels& kernels, const float* x, std::size_t rows, std::size_t columns, float* y,
                 std::size_t threads);

}  // namespace graphwright
