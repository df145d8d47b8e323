// Four lanes in the compiler's own vector type: the baseline of any processor.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace dspark {
namespace {

struct Vec {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;
  static constexpr int kPanelVecs = 4;
  static constexpr int kPanelRequests = 2;

  static F set(float x) { return F{x, x, x, x}; }
  static F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static F load(const uint16_t* p) {
    I x = {p[0], p[1], p[2], p[3]};
    return bits(x << 16);
  }
  // Splits interleaved pairs: even and odd elements of 2 * kWidth.
  static void load_pairs(const uint16_t* p, F* even, F* odd) {
    I x;
    std::memcpy(&x, p, sizeof x);
    *even = bits(x << 16);
    *odd = bits(x & static_cast<int32_t>(0xffff0000u));
  }
  static void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
  static void store(uint16_t* p, F x) {
    for (int i = 0; i < kWidth; ++i) p[i] = to_bf16(x[i]);
  }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  // The second operand wins when the first is NaN.
  static F max(F x, F acc) { return select(x > acc, x, acc); }
  static bool any_nan(F x) {
    const I m = x != x;
    return (m[0] | m[1] | m[2] | m[3]) != 0;
  }
  static F exp(F x) {
    const I live = x >= set(-87.0f);
    const F safe = select(live, x, set(0.0f));
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
    const F magic = set(12582912.0f);
    const F n = (safe * set(1.44269504f) + magic) - magic;
    const F r = (safe - n * set(0.693359375f)) - n * set(-2.12194440e-4f);
    F p = set(1.0f / 5040);
    p = p * r + set(1.0f / 720);
    p = p * r + set(1.0f / 120);
    p = p * r + set(1.0f / 24);
    p = p * r + set(1.0f / 6);
    p = p * r + set(0.5f);
    p = p * r + set(1.0f);
    p = p * r + set(1.0f);
    const I e = (__builtin_convertvector(n, I) + 127) << 23;
    const F y = p * bits(e);
    return select(live, y, select(x != x, x, set(0.0f)));
  }
  static float reduce_max(F x) {
    float m = x[0];
    for (int i = 1; i < 4; ++i) m = x[i] > m ? x[i] : m;
    return m;
  }
  static float reduce_add(F x) { return (x[0] + x[1]) + (x[2] + x[3]); }

  struct Sum {
    double s[4] = {0, 0, 0, 0};
    void add(F x) {
      for (int i = 0; i < 4; ++i) s[i] += static_cast<double>(x[i]);
    }
    double total() const { return (s[0] + s[1]) + (s[2] + s[3]); }
  };

  // Lane-wise argmax; index of lane i is first + i.
  static void track(F x, int32_t first, float* best, int32_t* index) {
    for (int i = 0; i < 4; ++i) {
      if (x[i] > best[i]) {
        best[i] = x[i];
        index[i] = first + i;
      }
    }
  }
  static int64_t compress_above(F x, F threshold, int32_t first, int32_t* out) {
    int64_t n = 0;
    for (int i = 0; i < 4; ++i) {
      if (x[i] > threshold[i]) out[n++] = first + i;
    }
    return n;
  }

 private:
  static F bits(I x) {
    F y;
    std::memcpy(&y, &x, sizeof y);
    return y;
  }
  static F select(I mask, F a, F b) {
    I x, y;
    std::memcpy(&x, &a, sizeof x);
    std::memcpy(&y, &b, sizeof y);
    return bits((x & mask) | (y & ~mask));
  }
};

}  // namespace
}  // namespace dspark
