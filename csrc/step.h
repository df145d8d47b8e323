// What one request needs at one position besides the vocabulary product.
#pragma once

#include <cstdint>
#include <vector>

#include "head.h"
#include "sequential.h"

namespace dspark {

// Latents of all requests, rewritten at every position. W is the type of the weights.
template <typename W>
class Latents {
 public:
  Latents(const KernelTable& kernels, const Head& head, const DraftArgs& args);

  // Reads the previous token and the hidden state of (r, k); writes the latent that
  // W2 multiplies and the confidence. False if the confidence is not finite.
  bool update(int64_t r, int64_t k, int64_t previous);

  int64_t stride() const { return stride_; }
  const float* f32(int64_t r) const { return f32_.data() + r * stride_; }
  const uint16_t* bf16(int64_t r) const { return bf16_.data() + r * stride_; }

 private:
  struct Scratch;
  void gated(const float* input, const float* markov, float* out) const;
  void recurrent(const float* input, float* state, float* out) const;
  void store(int64_t r, const float* latent);
  float confidence(const float* hidden, const float* markov) const;

  const KernelTable& kernels_;
  const RowKernels<W>& weight_kernels_;
  const Head& head_;
  const DraftArgs& a_;
  int64_t stride_;
  std::vector<float> f32_, state_;
  std::vector<uint16_t> bf16_;
};

}  // namespace dspark
