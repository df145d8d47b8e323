#include "step.h"

#include <cmath>

namespace dspark {
namespace {

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// bfloat16 layers hand on bfloat16, as the checkpoint's own linear layers do.
float rounded(float x, const float*) { return x; }
float rounded(float x, const uint16_t*) { return to_float(to_bf16(x)); }

}  // namespace

template <typename W>
Latents<W>::Latents(const KernelTable& kernels, const Head& head, const DraftArgs& args)
    : kernels_(kernels),
      weight_kernels_(rows(kernels, static_cast<const W*>(nullptr))),
      head_(head),
      a_(args),
      stride_(head.padded_rank()),
      f32_(args.requests * stride_, 0.0f),
      state_(head.type == HeadType::kRnn ? args.requests * head.rank : 0, 0.0f),
      bf16_(sizeof(W) == 2 ? args.requests * stride_ : 0, 0) {}

template <typename W>
bool Latents<W>::update(int64_t r, int64_t k, int64_t previous, float* scratch) {
  const int64_t rank = head_.rank, d = head_.hidden;
  const int64_t at = r * a_.hidden_strides[0] + k * a_.hidden_strides[1];
  // [latent ; state ; markov ; hidden ; markov]: the recurrent input is the three parts
  // after the latent, the gated input the last two.
  float* latent = scratch;
  float* input = latent + rank;
  float* markov = input + rank;
  float* hidden = markov + rank;
  if (head_.w1 != nullptr) {
    const W* row = static_cast<const W*>(head_.w1) + previous * rank;
    for (int64_t i = 0; i < rank; ++i) markov[i] = to_float(row[i]);
  }
  if (head_.type == HeadType::kVanilla) {
    store(r, markov);
  } else if (head_.type == HeadType::kGated) {
    read_hidden(at, hidden);
    for (int64_t i = 0; i < rank; ++i) hidden[d + i] = markov[i];
    gated(hidden, markov, latent);
    store(r, latent);
  } else if (head_.type == HeadType::kRnn) {
    float* state = state_.data() + r * rank;
    for (int64_t i = 0; i < rank; ++i) input[i] = state[i];
    read_hidden(at, hidden);
    recurrent(input, state, latent);
    store(r, latent);
  }
  if (a_.confidence == nullptr) return true;
  const float c = confidence(at, markov);
  a_.confidence[r * a_.positions + k] = c;
  return std::isfinite(c);
}

template <typename W>
void Latents<W>::read_hidden(int64_t at, float* out) const {
  for (int64_t i = 0; i < head_.hidden; ++i) {
    out[i] = a_.hidden_bf16 ? to_float(static_cast<const uint16_t*>(a_.hidden)[at + i])
                            : static_cast<const float*>(a_.hidden)[at + i];
  }
}

template <typename W>
void Latents<W>::gated(const float* input, const float* markov, float* out) const {
  const W* weight = static_cast<const W*>(head_.joint_weight);
  const W* bias = static_cast<const W*>(head_.joint_bias);
  const int64_t width = head_.hidden + head_.rank;
  for (int64_t i = 0; i < head_.rank; ++i) {
    const float x = weight_kernels_.dot(weight + i * width, input, width);
    out[i] = sigmoid(x + to_float(bias[i])) * markov[i];
  }
}

template <typename W>
void Latents<W>::recurrent(const float* input, float* state, float* out) const {
  const W* weight = static_cast<const W*>(head_.joint_weight);
  const W* bias = static_cast<const W*>(head_.joint_bias);
  const int64_t rank = head_.rank, width = 2 * rank + head_.hidden;
  const auto row = [&](int64_t i) {
    return weight_kernels_.dot(weight + i * width, input, width) + to_float(bias[i]);
  };
  for (int64_t i = 0; i < rank; ++i) {
    const float gate = sigmoid(row(i));
    const float candidate = std::tanh(row(rank + i));
    state[i] = gate * state[i] + (1.0f - gate) * candidate;
    out[i] = std::tanh(row(2 * rank + i));
  }
}

template <typename W>
void Latents<W>::store(int64_t r, const float* latent) {
  for (int64_t i = 0; i < head_.rank; ++i) {
    f32_[r * stride_ + i] = rounded(latent[i], static_cast<const W*>(nullptr));
    if (sizeof(W) == 2) bf16_[r * stride_ + i] = to_bf16(latent[i]);
  }
}

template <typename W>
float Latents<W>::confidence(int64_t at, const float* markov) const {
  const float* w = head_.confidence_weight;
  const int64_t d = head_.hidden;
  float x = a_.hidden_bf16
                ? kernels_.bf16.dot(static_cast<const uint16_t*>(a_.hidden) + at, w, d)
                : kernels_.f32.dot(static_cast<const float*>(a_.hidden) + at, w, d);
  if (head_.confidence_markov) x += kernels_.f32.dot(w + d, markov, head_.rank);
  if (head_.confidence_bias != nullptr) x += head_.confidence_bias[0];
  return sigmoid(x);
}

template class Latents<float>;
template class Latents<uint16_t>;

}  // namespace dspark
