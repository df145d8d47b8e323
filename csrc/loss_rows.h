// Training loss of rows of logits and its gradient in them, in place (3.3).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dspark {

// Loss of a row: alpha * CE + beta * |q - p|_1, times its weight. The target's
// distribution is `top` ids with probabilities and one event "something else".
struct LossRowsArgs {
  void* logits;  // [rows, vocab], overwritten by the gradient
  bool bf16;
  int64_t rows, vocab, top;
  const int32_t* ids;    // [rows, top] in [0, vocab); -1: cannot be drafted
  const float* probs;    // [rows, top]
  const float* weights;  // [rows]
  float alpha, beta;
  float* cross_entropy;  // [rows], unweighted
  float* distance;       // [rows], unweighted
};

void loss_rows(const KernelTable& kernels, const LossRowsArgs& args);

}  // namespace dspark
