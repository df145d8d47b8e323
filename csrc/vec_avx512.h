// Sixteen lanes, AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace dspark {
namespace {

struct Vec {
  using F = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kPanelVecs = 4;
  static constexpr int kPanelRequests = 6;

  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const uint16_t* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static void load_pairs(const uint16_t* p, F* even, F* odd) {
    const __m512i x = _mm512_loadu_si512(p);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    *odd = _mm512_castsi512_ps(
        _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  // Round to nearest even; x is not NaN.
  static void store(uint16_t* p, F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd =
        _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i high = _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // The second operand wins when the first is NaN.
  static F max(F x, F acc) { return _mm512_max_ps(x, acc); }
  static bool any_nan(F x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
  static F exp(F x) {
    const __mmask16 live = _mm512_cmp_ps_mask(x, set(-87.0f), _CMP_NLT_UQ);
    const F n =
        _mm512_roundscale_ps(mul(x, set(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    F r = _mm512_fnmadd_ps(n, set(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, set(-2.12194440e-4f), r);
    F p = set(1.0f / 5040);
    p = fma(p, r, set(1.0f / 720));
    p = fma(p, r, set(1.0f / 120));
    p = fma(p, r, set(1.0f / 24));
    p = fma(p, r, set(1.0f / 6));
    p = fma(p, r, set(0.5f));
    p = fma(p, r, set(1.0f));
    p = fma(p, r, set(1.0f));
    return _mm512_maskz_scalef_ps(live, p, n);
  }
  static float reduce_max(F x) { return _mm512_reduce_max_ps(x); }
  static float reduce_add(F x) { return _mm512_reduce_add_ps(x); }

  struct Sum {
    __m512d a = _mm512_setzero_pd(), b = _mm512_setzero_pd();
    void add(F x) {
      a = _mm512_add_pd(a, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
      b = _mm512_add_pd(b, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
    }
    double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(a, b)); }
  };

  static void track(F x, int32_t first, float* best, int32_t* index) {
    const F old = load(best);
    const __mmask16 above = _mm512_cmp_ps_mask(x, old, _CMP_GT_OQ);
    const __m512i lanes = _mm512_add_epi32(
        _mm512_set1_epi32(first),
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    store(best, _mm512_mask_mov_ps(old, above, x));
    _mm512_mask_storeu_epi32(index, above, lanes);
  }
  static int64_t compress_above(F x, F threshold, int32_t first, int32_t* out) {
    unsigned mask = _mm512_cmp_ps_mask(x, threshold, _CMP_GT_OQ);
    int64_t n = 0;
    for (; mask != 0; mask &= mask - 1) out[n++] = first + __builtin_ctz(mask);
    return n;
  }
};

}  // namespace
}  // namespace dspark
