// The loop that samples a block left to right (paper sections 3.1 and 3.2.1).
#pragma once

#include <cstdint>

#include "head.h"

namespace dspark {

struct DraftArgs {
  const void* base;  // [requests, positions, draft_vocab], float32 or bfloat16
  bool base_bf16;
  int64_t base_strides[2];  // elements, of requests and positions
  const void* hidden;       // [requests, positions, hidden], or null if not needed
  bool hidden_bf16;
  int64_t hidden_strides[2];
  const int64_t* anchors;  // [requests]
  int64_t requests, positions;
  const float* temperature;  // [requests] or null: all greedy
  const double* uniforms;    // [requests, positions] or null if all greedy
  int64_t topk;              // candidates per position, 0 for the whole vocabulary
  int64_t* token_ids;        // [requests, positions]
  float* probs;              // [requests, positions, S] or null
  int32_t* support;          // [requests, positions, topk] or null
  float* confidence;         // [requests, positions] or null
  bool* finite;              // [requests]
};

// An id a request starts from, or draws, is always inside w1; the caller has checked
// anchors and draft_to_target.
void draft_sequential(const KernelTable& kernels, Head& head, const DraftArgs& args);

}  // namespace dspark
