// Eight lanes, AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace dspark {
namespace {

struct Vec {
  using F = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kPanelVecs = 2;
  static constexpr int kPanelRequests = 6;

  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const uint16_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static void load_pairs(const uint16_t* p, F* even, F* odd) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    *odd = _mm256_castsi256_ps(
        _mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  // Round to nearest even; x is not NaN.
  static void store(uint16_t* p, F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd =
        _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i high = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high),
                                            _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  // The second operand wins when the first is NaN.
  static F max(F x, F acc) { return _mm256_max_ps(x, acc); }
  static bool any_nan(F x) {
    return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)) != 0;
  }
  static F exp(F x) {
    const F dead = _mm256_cmp_ps(x, set(-87.0f), _CMP_LT_OQ);
    const F n = _mm256_round_ps(mul(x, set(1.44269504f)),
                                _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    F r = _mm256_fnmadd_ps(n, set(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, set(-2.12194440e-4f), r);
    F p = set(1.0f / 5040);
    p = fma(p, r, set(1.0f / 720));
    p = fma(p, r, set(1.0f / 120));
    p = fma(p, r, set(1.0f / 24));
    p = fma(p, r, set(1.0f / 6));
    p = fma(p, r, set(0.5f));
    p = fma(p, r, set(1.0f));
    p = fma(p, r, set(1.0f));
    const __m256i e = _mm256_slli_epi32(
        _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(dead, mul(p, _mm256_castsi256_ps(e)));
  }
  static float reduce_max(F x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    m = _mm_max_ss(m, _mm_movehdup_ps(m));
    return _mm_cvtss_f32(m);
  }
  static float reduce_add(F x) {
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    m = _mm_add_ss(m, _mm_movehdup_ps(m));
    return _mm_cvtss_f32(m);
  }

  struct Sum {
    __m256d a = _mm256_setzero_pd(), b = _mm256_setzero_pd();
    void add(F x) {
      a = _mm256_add_pd(a, _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
      b = _mm256_add_pd(b, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
    }
    double total() const {
      alignas(32) double s[4];
      _mm256_store_pd(s, _mm256_add_pd(a, b));
      return (s[0] + s[1]) + (s[2] + s[3]);
    }
  };

  static void track(F x, int32_t first, float* best, int32_t* index) {
    const F old = load(best);
    const F above = _mm256_cmp_ps(x, old, _CMP_GT_OQ);
    const __m256i lanes = _mm256_add_epi32(_mm256_set1_epi32(first),
                                           _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    auto* at = reinterpret_cast<__m256i*>(index);
    store(best, _mm256_blendv_ps(old, x, above));
    _mm256_storeu_si256(at, _mm256_blendv_epi8(_mm256_loadu_si256(at), lanes,
                                               _mm256_castps_si256(above)));
  }
  static int64_t compress_above(F x, F threshold, int32_t first, int32_t* out) {
    unsigned mask = static_cast<unsigned>(
        _mm256_movemask_ps(_mm256_cmp_ps(x, threshold, _CMP_GT_OQ)));
    int64_t n = 0;
    for (; mask != 0; mask &= mask - 1) out[n++] = first + __builtin_ctz(mask);
    return n;
  }
};

}  // namespace
}  // namespace dspark
