// The k largest logits of a row, as ascending indices.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace dspark {

class TopK {
 public:
  explicit TopK(const KernelTable& kernels) : kernels_(kernels) {}

  // Writes k <= n indices in ascending order. Among equal logits the lowest indices
  // win; NaN counts as -inf.
  template <typename T>
  void select(const T* x, int64_t n, int64_t k, int32_t* out);

 private:
  template <typename T>
  float lower_bound(const T* x, int64_t n, int64_t k);

  const KernelTable& kernels_;
  std::vector<float> groups_;
  std::vector<int32_t> found_;
  std::vector<uint64_t> keys_, order_;
};

}  // namespace dspark
