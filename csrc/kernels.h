// The vectorised inner loops, one table of them per instruction set.
//
// A "block" is at most kBlock consecutive logits of one row; z = x * inv_t is a scaled
// logit and exp(z - m) its weight. Weights below e^-87 count as zero in every backend,
// so that no denormal can be drawn. T is float, or uint16_t holding bfloat16.
#pragma once

#include <cstdint>

#include "isa.h"

namespace dspark {

constexpr int64_t kBlock = 2048;
constexpr int64_t kTile = 16;      // vocabulary rows interleaved in packed W2
constexpr int64_t kPanel = 64;     // vocabulary rows per call of panel_*
constexpr int64_t kRankUnit = 32;  // packed bfloat16 ranks are multiples of it

struct BlockStats {
  float max;   // largest z, NaN ignored, -inf if there is none
  double sum;  // sum of exp(z - max), 0 if max is -inf
};

template <typename T>
struct RowKernels {
  float (*max)(const T* x, int64_t n, float inv_t);
  BlockStats (*stats)(const T* x, int64_t n, float inv_t);
  void (*weights)(const T* x, int64_t n, float inv_t, float m, float* w);
  bool (*has_nan)(const T* x, int64_t n);
  // Dot of a weight row with float32 input.
  float (*dot)(const T* w, const float* x, int64_t n);
  // out[q][64] = latents[q] . W2 rows, for `requests` latents of `rank` floats.
  void (*panel)(const T* packed, int64_t rank, const float* latent, int64_t stride,
                int64_t requests, float* out);
  // m[i] = max(m[i], x[i]), NaN ignored.
  void (*fold_max)(const T* x, int64_t n, float* m);
  // Appends the indices of x > threshold to out, returns how many.
  int64_t (*select_above)(const T* x, int64_t n, float threshold, int32_t* out);
  // out = bias + base for the n <= 64 logits of a panel, max[16] is their running
  // lane-wise maximum (NaN ignored); returns NaN.
  bool (*add_panel)(const float* bias, const T* base, int64_t n, float* max,
                    float* out);
  // Running argmax of bias + base: best[16] and index[16] are lane-wise; returns NaN.
  bool (*argmax_panel)(const float* bias, const T* base, int64_t n, int32_t first,
                       float* best, int32_t* index);
  // out = exp(x - m) * factor, rounded to T; out may be x.
  void (*scaled_exp)(const T* x, int64_t n, float m, float factor, T* out);
};

// The panel product on matrix tiles, for `requests` bfloat16 latents at once. A thread
// calls begin, then panel any number of times with as many requests, then end, which
// gives back the tile configuration that was there before.
struct TileKernels {
  int64_t min_requests;  // from which it is faster than panel_bf16
  int64_t max_requests;
  void (*begin)(int64_t requests, void* saved);  // saved: 64 bytes
  void (*panel)(const uint16_t* packed, int64_t rank, const uint16_t* latent,
                int64_t requests, float* out);
  void (*end)(const void* saved);
};

struct KernelTable {
  RowKernels<float> f32;
  RowKernels<uint16_t> bf16;
  double (*sum)(const float* w, int64_t n);
  // w = max(0, w * scale - q); returns the sum of w.
  double (*residual)(float* w, const float* q, int64_t n, float scale);
  void (*scale)(float* w, int64_t n, float factor);
  // The panel product with bfloat16 latents; null without bfloat16 dot products.
  void (*panel_bf16)(const uint16_t* packed, int64_t rank, const uint16_t* latent,
                     int64_t stride, int64_t requests, float* out);
  const TileKernels* tiles;  // null without matrix tiles
};

// Null if this build does not contain the instruction set.
const KernelTable* kernel_table(Isa isa);

extern const KernelTable* const kScalarTable;
extern const KernelTable* const kAvx2Table;
extern const KernelTable* const kAvx512Table;
extern const KernelTable* const kAvx512Bf16Table;
extern const KernelTable* const kAmxTable;

// Internal linkage on purpose: this header is compiled with several instruction sets.
namespace {

[[maybe_unused]] inline const RowKernels<float>& rows(const KernelTable& table,
                                                      const float*) {
  return table.f32;
}
[[maybe_unused]] inline const RowKernels<uint16_t>& rows(const KernelTable& table,
                                                         const uint16_t*) {
  return table.bf16;
}

[[maybe_unused]] inline float to_float(float x) { return x; }
[[maybe_unused]] inline float to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  __builtin_memcpy(&y, &bits, sizeof y);
  return y;
}

// Round to nearest even; NaN stays NaN.
[[maybe_unused]] inline uint16_t to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace
}  // namespace dspark
