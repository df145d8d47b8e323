#include "loss_rows.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"

namespace dspark {
namespace {

float sign(float x) { return static_cast<float>((x > 0) - (x < 0)); }

void put(float* x, float value) { *x = value; }
void put(uint16_t* x, float value) { *x = to_bf16(value); }

struct Normaliser {
  float max;
  float total;  // sum of exp(x - max)
};

template <typename T>
Normaliser normalise(const KernelTable& kernels, const T* x, int64_t n) {
  float m = -INFINITY;
  double sum = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const BlockStats s = rows(kernels, x).stats(x + i, std::min(kBlock, n - i), 1.0f);
    if (s.max > m) {
      sum *= std::exp(static_cast<double>(m) - static_cast<double>(s.max));
      m = s.max;
    }
    sum += s.sum * std::exp(static_cast<double>(s.max) - static_cast<double>(m));
  }
  return {m, static_cast<float>(sum)};
}

// With s the signs of q - p, s_o that of "something else" and g = sum of q * s, the
// gradient is (alpha * sum of p + beta * (s_o - g)) * q, plus
// beta * q * (s - s_o) - alpha * p at the ids.
template <typename T>
void one_row(const KernelTable& kernels, const LossRowsArgs& a, int64_t r, float* q) {
  T* x = static_cast<T*>(a.logits) + r * a.vocab;
  const int32_t* ids = a.ids + r * a.top;
  const float* p = a.probs + r * a.top;
  const Normaliser norm = normalise(kernels, x, a.vocab);
  const double log_total = std::log(static_cast<double>(norm.total));
  double ce = 0, distance = 0, q_in = 0, p_in = 0, p_all = 0, mean = 0;
  for (int64_t j = 0; j < a.top; ++j) {
    p_all += p[j];
    if (ids[j] < 0) {
      distance += p[j];
      continue;
    }
    const double z = static_cast<double>(to_float(x[ids[j]]) - norm.max);
    q[j] = static_cast<float>(std::exp(z) / norm.total);
    ce -= p[j] * (z - log_total);
    distance += std::fabs(q[j] - p[j]);
    mean += q[j] * sign(q[j] - p[j]);
    q_in += q[j];
    p_in += p[j];
  }
  const float gap = static_cast<float>((1.0 - q_in) - (1.0 - p_all));
  const float other = sign(gap);
  mean += (1.0 - q_in) * other;
  a.cross_entropy[r] = static_cast<float>(ce);
  a.distance[r] = static_cast<float>(distance) + std::fabs(gap);
  const float w = a.weights[r];
  const float dense =
      static_cast<float>(w * (a.alpha * p_in + a.beta * (other - mean)));
  rows(kernels, x).scaled_exp(x, a.vocab, norm.max, dense / norm.total, x);
  for (int64_t j = 0; j < a.top; ++j) {
    if (ids[j] < 0) continue;
    const float own = a.beta * q[j] * (sign(q[j] - p[j]) - other) - a.alpha * p[j];
    put(x + ids[j], dense * q[j] + w * own);
  }
}

template <typename T>
void run(const KernelTable& kernels, const LossRowsArgs& a) {
  constexpr int64_t kParallelWork = 1 << 17;
  parallel_team(a.rows * a.vocab >= kParallelWork, [&](int thread, int team) {
    std::vector<float> q(a.top);
    const Range range = share(a.rows, thread, team);
    for (int64_t r = range.begin; r < range.end; ++r) {
      one_row<T>(kernels, a, r, q.data());
    }
  });
}

}  // namespace

void loss_rows(const KernelTable& kernels, const LossRowsArgs& args) {
  if (args.bf16) {
    run<uint16_t>(kernels, args);
  } else {
    run<float>(kernels, args);
  }
}

}  // namespace dspark
