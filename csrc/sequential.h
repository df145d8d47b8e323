// The loop that samples a block left to right (paper sections 3.1 and 3.2.1).
#pragma once

#include <cstdint>

#include "head.h"
#include "rejection.h"

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
  float* certainty;          // [requests, positions] or null
  bool* finite;              // [requests]
};

inline bool is_greedy(const DraftArgs& a, int64_t r) {
  return a.temperature == nullptr || !(a.temperature[r] >= kGreedyTemperature);
}

// Whether the logits of a request's position are kept, besides their argmax.
inline bool keeps_logits(const DraftArgs& a, int64_t r) {
  return a.certainty != nullptr || !is_greedy(a, r);
}

// The row of base logits of (request, position); B is their type.
template <typename B>
const B* base(const DraftArgs& a, int64_t r, int64_t k) {
  return static_cast<const B*>(a.base) + r * a.base_strides[0] + k * a.base_strides[1];
}

// Shares of a vocabulary that matrix tiles have computed in this process: tests tell
// from it that they ran.
int64_t tile_calls();
void count_tile_call();

// An id a request starts from, or draws, is always inside w1; the caller has checked
// anchors and draft_to_target.
void draft_sequential(const KernelTable& kernels, Head& head, const DraftArgs& args);

}  // namespace dspark
