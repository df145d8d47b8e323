// The panel product with bfloat16 dot products (vdpbf16ps); after kernels.inc.h.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace dspark {
namespace {

template <int R>
void dot_panel(const uint16_t* packed, int64_t rank, const uint16_t* latent,
               int64_t stride, float* out) {
  constexpr int N = kPanel / kTile;
  __m512 acc[R][N];
  for (int q = 0; q < R; ++q) {
    for (int v = 0; v < N; ++v) acc[q][v] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < rank; k += 2) {
    __m512bh w[N];
    for (int v = 0; v < N; ++v) {
      w[v] = (__m512bh)_mm512_loadu_si512(packed + v * rank * kTile + k * kTile);
    }
    for (int q = 0; q < R; ++q) {
      int32_t pair;
      __builtin_memcpy(&pair, latent + q * stride + k, sizeof pair);
      const __m512bh b = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < N; ++v) {
        acc[q][v] = _mm512_dpbf16_ps(acc[q][v], w[v], b);
      }
    }
  }
  for (int q = 0; q < R; ++q) {
    for (int v = 0; v < N; ++v) {
      _mm512_storeu_ps(out + q * kPanel + v * kTile, acc[q][v]);
    }
  }
}

void panel_bf16(const uint16_t* packed, int64_t rank, const uint16_t* latent,
                int64_t stride, int64_t requests, float* out) {
  for (; requests >= 6; requests -= 6, latent += 6 * stride, out += 6 * kPanel) {
    dot_panel<6>(packed, rank, latent, stride, out);
  }
  for (; requests >= 2; requests -= 2, latent += 2 * stride, out += 2 * kPanel) {
    dot_panel<2>(packed, rank, latent, stride, out);
  }
  if (requests == 1) dot_panel<1>(packed, rank, latent, stride, out);
}

constexpr KernelTable with_bf16_dot() {
  KernelTable table = kTable;
  table.panel_bf16 = panel_bf16;
  return table;
}

}  // namespace
}  // namespace dspark
