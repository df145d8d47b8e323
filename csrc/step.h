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

  // Floats of scratch that a thread brings to update.
  int64_t scratch_size() const { return 4 * head_.rank + head_.hidden; }

  // Reads the previous token and the hidden state of (r, k); writes the latent that
  // W2 multiplies and the confidence. False if the confidence is not finite.
  bool update(int64_t r, int64_t k, int64_t previous, float* scratch);

  int64_t stride() const { return stride_; }
  const float* f32(int64_t r) const { return f32_.data() + r * stride_; }
  const uint16_t* bf16(int64_t r) const { return bf16_.data() + r * stride_; }

 private:
  void read_hidden(int64_t at, float* out) const;
  void gated(const float* input, const float* markov, float* out) const;
  void recurrent(const float* input, float* state, float* out) const;
  void store(int64_t r, const float* latent);
  float confidence(int64_t at, const float* markov) const;

  const KernelTable& kernels_;
  const RowKernels<W>& weight_kernels_;
  const Head& head_;
  const DraftArgs& a_;
  int64_t stride_;
  std::vector<float> f32_, state_;
  LineVector<uint16_t> bf16_;
};

}  // namespace dspark
