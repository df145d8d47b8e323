// Rejection sampling of draft tokens from target logits (paper section 2.1).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dspark {

struct RejectionArgs {
  const void* logits;  // [N + R, vocab], float32 or bfloat16
  bool bf16;
  int64_t logits_stride;  // elements between rows
  int64_t vocab;
  const void* draft_ids;  // [N] int32 or int64
  bool ids64;
  const int64_t* lengths;  // [R], sums to N
  int64_t requests;
  const float* draft_probs;  // [N, support_size] or null: one-hot
  int64_t probs_stride;      // elements between rows
  const int32_t* support;    // [N or 1, support_size] or null: identity
  int64_t support_stride;    // 0 when shared
  int64_t support_size;
  const float* temperature;       // [R] or null: all greedy
  const double* accept_uniforms;  // [N], null if all greedy
  const double* sample_uniforms;  // [R], null if all greedy
  bool block;                     // block verification, else the standard method
  int32_t* token_ids;             // [R, width], filled with -1 by the callee
  int64_t width;
  int32_t* num_emitted;  // [R]
};

constexpr float kGreedyTemperature = 1e-5f;

void rejection_sample(const KernelTable& kernels, const RejectionArgs& args);

}  // namespace dspark
