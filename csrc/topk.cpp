#include "topk.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

namespace dspark {
namespace {

// Larger logit first, then lower index, as one integer to be ordered descending.
uint64_t key(float x, int32_t index) {
  if (x != x) x = -INFINITY;
  if (x == 0.0f) x = 0.0f;  // -0 equals +0
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | ~static_cast<uint32_t>(index);
}

}  // namespace

// The k-th largest of 4k group maxima: at least k logits are as large.
template <typename T>
float TopK::lower_bound(const T* x, int64_t n, int64_t k) {
  const int64_t groups = 4 * k;
  if (n < 2 * groups) return -INFINITY;
  groups_.assign(groups, -INFINITY);
  const RowKernels<T>& kernels = rows(kernels_, x);
  for (int64_t i = 0; i < n; i += groups) {
    kernels.fold_max(x + i, std::min(groups, n - i), groups_.data());
  }
  std::nth_element(groups_.begin(), groups_.begin() + (k - 1), groups_.end(),
                   std::greater<float>());
  return groups_[k - 1];
}

template <typename T>
void TopK::select(const T* x, int64_t n, int64_t k, int32_t* out) {
  const float bound = k < n ? lower_bound(x, n, k) : -INFINITY;
  found_.resize(n);
  int64_t count = n;
  if (bound > -INFINITY) {
    count = rows(kernels_, x)
                .select_above(x, n, std::nextafter(bound, -INFINITY), found_.data());
  } else {
    std::iota(found_.begin(), found_.end(), 0);
  }
  keys_.resize(count);
  for (int64_t i = 0; i < count; ++i) keys_[i] = key(to_float(x[found_[i]]), found_[i]);
  uint64_t last = 0;
  if (k < count) {
    order_ = keys_;
    std::nth_element(order_.begin(), order_.begin() + (k - 1), order_.end(),
                     std::greater<uint64_t>());
    last = order_[k - 1];
  }
  for (int64_t i = 0; i < count; ++i) {
    if (keys_[i] >= last) *out++ = found_[i];
  }
}

template void TopK::select(const float*, int64_t, int64_t, int32_t*);
template void TopK::select(const uint16_t*, int64_t, int64_t, int32_t*);

}  // namespace dspark
