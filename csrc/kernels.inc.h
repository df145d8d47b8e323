// The inner loops, written once over Vec; each kernels_*.cpp includes a vec_*.h first.
// Everything has internal linkage: an inline function shared between files compiled
// with different instruction sets could be linked in the wrong version.

#include <cstdint>

#include "kernels.h"

namespace dspark {
namespace {

using F = Vec::F;
constexpr int kW = Vec::kWidth;
const float kNegInf = -__builtin_inff();

// The last, partial vector of a row: nothing beyond the row is read.
template <typename T>
inline F load_tail(const T* x, int64_t n, float fill) {
  float buffer[kW];
  for (int i = 0; i < kW; ++i) buffer[i] = i < n ? to_float(x[i]) : fill;
  return Vec::load(buffer);
}

template <typename T>
float block_max(const T* x, int64_t n, float inv_t) {
  const F t = Vec::set(inv_t);
  F m0 = Vec::set(kNegInf), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = 0;
  for (; i + 4 * kW <= n; i += 4 * kW) {
    m0 = Vec::max(Vec::mul(Vec::load(x + i), t), m0);
    m1 = Vec::max(Vec::mul(Vec::load(x + i + kW), t), m1);
    m2 = Vec::max(Vec::mul(Vec::load(x + i + 2 * kW), t), m2);
    m3 = Vec::max(Vec::mul(Vec::load(x + i + 3 * kW), t), m3);
  }
  for (; i + kW <= n; i += kW) m0 = Vec::max(Vec::mul(Vec::load(x + i), t), m0);
  if (i < n) m1 = Vec::max(Vec::mul(load_tail(x + i, n - i, kNegInf), t), m1);
  return Vec::reduce_max(Vec::max(Vec::max(m0, m1), Vec::max(m2, m3)));
}

template <typename T>
BlockStats block_stats(const T* x, int64_t n, float inv_t) {
  const float m = block_max(x, n, inv_t);
  if (m == kNegInf) return {m, 0.0};
  const F t = Vec::set(inv_t), shift = Vec::set(m);
  Vec::Sum sum;
  int64_t i = 0;
  for (; i + kW <= n; i += kW) {
    sum.add(Vec::exp(Vec::sub(Vec::mul(Vec::load(x + i), t), shift)));
  }
  if (i < n) {
    const F z = Vec::mul(load_tail(x + i, n - i, kNegInf), t);
    sum.add(Vec::exp(Vec::sub(z, shift)));
  }
  return {m, sum.total()};
}

template <typename T>
void block_weights(const T* x, int64_t n, float inv_t, float m, float* w) {
  const F t = Vec::set(inv_t), shift = Vec::set(m);
  int64_t i = 0;
  for (; i + kW <= n; i += kW) {
    Vec::store(w + i, Vec::exp(Vec::sub(Vec::mul(Vec::load(x + i), t), shift)));
  }
  if (i < n) {
    float buffer[kW];
    const F z = Vec::mul(load_tail(x + i, n - i, kNegInf), t);
    Vec::store(buffer, Vec::exp(Vec::sub(z, shift)));
    for (int64_t j = i; j < n; ++j) w[j] = buffer[j - i];
  }
}

template <typename T>
bool has_nan(const T* x, int64_t n) {
  int64_t i = 0;
  for (; i + kW <= n; i += kW) {
    if (Vec::any_nan(Vec::load(x + i))) return true;
  }
  return i < n && Vec::any_nan(load_tail(x + i, n - i, 0.0f));
}

template <typename T>
float dot(const T* w, const float* x, int64_t n) {
  F a = Vec::set(0.0f), b = a;
  int64_t i = 0;
  for (; i + 2 * kW <= n; i += 2 * kW) {
    a = Vec::fma(Vec::load(w + i), Vec::load(x + i), a);
    b = Vec::fma(Vec::load(w + i + kW), Vec::load(x + i + kW), b);
  }
  if (i + kW <= n) {
    a = Vec::fma(Vec::load(w + i), Vec::load(x + i), a);
    i += kW;
  }
  if (i < n) {
    b = Vec::fma(load_tail(w + i, n - i, 0.0f), load_tail(x + i, n - i, 0.0f), b);
  }
  return Vec::reduce_add(Vec::add(a, b));
}

template <typename T>
void fold_max(const T* x, int64_t n, float* m) {
  int64_t i = 0;
  for (; i + kW <= n; i += kW) {
    Vec::store(m + i, Vec::max(Vec::load(x + i), Vec::load(m + i)));
  }
  for (; i < n; ++i) m[i] = to_float(x[i]) > m[i] ? to_float(x[i]) : m[i];
}

template <typename T>
int64_t select_above(const T* x, int64_t n, float threshold, int32_t* out) {
  const F t = Vec::set(threshold);
  int64_t count = 0, i = 0;
  for (; i + kW <= n; i += kW) {
    const F v = Vec::load(x + i);
    count += Vec::compress_above(v, t, static_cast<int32_t>(i), out + count);
  }
  for (; i < n; ++i) {
    if (to_float(x[i]) > threshold) out[count++] = static_cast<int32_t>(i);
  }
  return count;
}

// Accumulates w[v] * latent[q][k] into acc for one k (float32) or a pair (bfloat16).
template <int R, int N>
struct Accumulate {
  static void run(const float* const* tile, int64_t at, const float* latent,
                  int64_t stride, F (&acc)[R][N]) {
    F w[N];
    for (int v = 0; v < N; ++v) w[v] = Vec::load(tile[v] + at * kTile);
    for (int q = 0; q < R; ++q) {
      const F b = Vec::set(latent[q * stride + at]);
      for (int v = 0; v < N; ++v) acc[q][v] = Vec::fma(w[v], b, acc[q][v]);
    }
  }
  static void run(const uint16_t* const* tile, int64_t at, const float* latent,
                  int64_t stride, F (&acc)[R][N]) {
    F even[N], odd[N];
    for (int v = 0; v < N; ++v) {
      Vec::load_pairs(tile[v] + at * kTile, &even[v], &odd[v]);
    }
    for (int q = 0; q < R; ++q) {
      const F b0 = Vec::set(latent[q * stride + at]);
      const F b1 = Vec::set(latent[q * stride + at + 1]);
      for (int v = 0; v < N; ++v) {
        acc[q][v] = Vec::fma(odd[v], b1, Vec::fma(even[v], b0, acc[q][v]));
      }
    }
  }
};

template <typename T, int R>
void panel_requests(const T* packed, int64_t rank, const float* latent, int64_t stride,
                    float* out) {
  constexpr int N = Vec::kPanelVecs;
  constexpr int kGroup = sizeof(T) == 2 ? 2 : 1;  // elements of rank per vector
  for (int64_t v0 = 0; v0 < kPanel; v0 += N * kW) {
    const T* tile[N];
    F acc[R][N];
    for (int v = 0; v < N; ++v) {
      const int64_t row = v0 + v * kW;
      tile[v] = packed + (row / kTile) * rank * kTile + (row % kTile) * kGroup;
      for (int q = 0; q < R; ++q) acc[q][v] = Vec::set(0.0f);
    }
    for (int64_t k = 0; k < rank; k += kGroup) {
      Accumulate<R, N>::run(tile, k, latent, stride, acc);
    }
    for (int q = 0; q < R; ++q) {
      for (int v = 0; v < N; ++v) {
        Vec::store(out + q * kPanel + v0 + v * kW, acc[q][v]);
      }
    }
  }
}

template <typename T>
void panel(const T* packed, int64_t rank, const float* latent, int64_t stride,
           int64_t requests, float* out) {
  constexpr int R = Vec::kPanelRequests;
  for (; requests >= R; requests -= R, latent += R * stride, out += R * kPanel) {
    panel_requests<T, R>(packed, rank, latent, stride, out);
  }
  if (requests >= R / 2 && R > 2) {
    panel_requests<T, R / 2>(packed, rank, latent, stride, out);
    requests -= R / 2, latent += R / 2 * stride, out += R / 2 * kPanel;
  }
  for (; requests > 0; --requests, latent += stride, out += kPanel) {
    panel_requests<T, 1>(packed, rank, latent, stride, out);
  }
}

double block_sum(const float* w, int64_t n) {
  Vec::Sum sum;
  int64_t i = 0;
  for (; i + kW <= n; i += kW) sum.add(Vec::load(w + i));
  if (i < n) sum.add(load_tail(w + i, n - i, 0.0f));
  return sum.total();
}

double block_residual(float* w, const float* q, int64_t n, float scale) {
  const F s = Vec::set(scale), zero = Vec::set(0.0f);
  Vec::Sum sum;
  int64_t i = 0;
  for (; i + kW <= n; i += kW) {
    const F p = Vec::mul(Vec::load(w + i), s);
    const F d = Vec::max(Vec::sub(p, Vec::load(q + i)), zero);
    Vec::store(w + i, d);
    sum.add(d);
  }
  double tail = 0.0;
  for (; i < n; ++i) {
    const float p = w[i] * scale;
    const float d = p - q[i];
    w[i] = d > 0.0f ? d : 0.0f;
    tail += static_cast<double>(w[i]);
  }
  return sum.total() + tail;
}

void block_scale(float* w, int64_t n, float factor) {
  const F s = Vec::set(factor);
  int64_t i = 0;
  for (; i + kW <= n; i += kW) Vec::store(w + i, Vec::mul(Vec::load(w + i), s));
  for (; i < n; ++i) w[i] *= factor;
}

// Logits i.. of a panel; those past its end are -inf.
template <typename T>
inline F panel_logits(const float* bias, const T* base, int64_t n, int64_t i) {
  if (i + kW <= n) return Vec::add(Vec::load(bias + i), Vec::load(base + i));
  if (i >= n) return Vec::set(kNegInf);
  return Vec::add(Vec::load(bias + i), load_tail(base + i, n - i, kNegInf));
}

template <typename T>
bool add_panel(const float* bias, const T* base, int64_t n, float* max, float* out) {
  bool nan = false;
  for (int64_t i = 0; i < n; i += kW) {
    const F v = panel_logits(bias, base, n, i);
    float* lanes = max + i % kTile;
    nan |= Vec::any_nan(v);
    Vec::store(lanes, Vec::max(v, Vec::load(lanes)));
    if (i + kW <= n) {
      Vec::store(out + i, v);
      continue;
    }
    float buffer[kW];
    Vec::store(buffer, v);
    for (int64_t j = i; j < n; ++j) out[j] = buffer[j - i];
  }
  return nan;
}

template <typename T>
bool argmax_panel(const float* bias, const T* base, int64_t n, int32_t first,
                  float* best, int32_t* index) {
  bool nan = false;
  for (int i = 0; i < kPanel; i += kW) {
    const F v = panel_logits(bias, base, n, i);
    nan |= Vec::any_nan(v);
    Vec::track(v, first + i, best + i % kTile, index + i % kTile);
  }
  return nan;
}

inline void round_to(float* out, float x) { *out = x; }
inline void round_to(uint16_t* out, float x) { *out = to_bf16(x); }

template <typename T>
void scaled_exp(const T* x, int64_t n, float m, float factor, T* out) {
  const F shift = Vec::set(m), f = Vec::set(factor);
  int64_t i = 0;
  for (; i + kW <= n; i += kW) {
    Vec::store(out + i, Vec::mul(Vec::exp(Vec::sub(Vec::load(x + i), shift)), f));
  }
  if (i < n) {
    float buffer[kW];
    const F z = Vec::sub(load_tail(x + i, n - i, kNegInf), shift);
    Vec::store(buffer, Vec::mul(Vec::exp(z), f));
    for (int64_t j = i; j < n; ++j) round_to(out + j, buffer[j - i]);
  }
}

template <typename T>
constexpr RowKernels<T> row_kernels() {
  return {block_max<T>, block_stats<T>,  block_weights<T>, has_nan<T>,
          dot<T>,       panel<T>,        fold_max<T>,      select_above<T>,
          add_panel<T>, argmax_panel<T>, scaled_exp<T>};
}

[[maybe_unused]] constexpr KernelTable kTable = {row_kernels<float>(),
                                                 row_kernels<uint16_t>(),
                                                 block_sum,
                                                 block_residual,
                                                 block_scale,
                                                 nullptr,
                                                 nullptr};

}  // namespace
}  // namespace dspark
