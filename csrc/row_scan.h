// One row of logits as a distribution: its argmax, its normaliser, draws from it.
//
// A row is cut into fixed blocks whose sums are added in order, so that no result
// depends on how many threads took part.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace dspark {

template <typename T>
struct Row {
  const T* data;
  int64_t size;
  float inv_t;  // 1 / temperature
};

// Position of u * total in the cumulative weights of one block: the first positive
// weight that takes `before` past `target`, else the last positive one, else -1.
int64_t search_block(const float* w, int64_t n, double before, double target);

template <typename T>
class RowScan {
 public:
  // With `parallel` the blocks of a row are shared out over the team.
  RowScan(const KernelTable& kernels, int64_t max_size, bool parallel);

  int64_t argmax(const Row<T>& row);

  // Finds maximum and normaliser. False if no logit is above -inf (or one is +inf).
  bool normalise(const Row<T>& row);

  // After normalise: softmax probability of one id in [0, size).
  float probability(const Row<T>& row, int64_t id) const;

  // After normalise: inverse CDF of the softmax at u.
  int64_t draw(const Row<T>& row, double u);

  // After normalise: softmax with the mass of `id` removed (id may be out of range).
  int64_t draw_without(const Row<T>& row, int64_t id, double u);

  // After normalise: sum of max(0, ratio * p - q). With `support`, q[j] belongs to id
  // support[j]. Nothing can be drawn from the row before it is normalised again.
  double residual_mass(const Row<T>& row, const float* q, const int32_t* support,
                       int64_t support_size, float ratio);

  // After normalise: a draw from max(0, ratio * p - q).
  int64_t draw_residual(const Row<T>& row, const float* q, const int32_t* support,
                        int64_t support_size, float ratio, double u);

  // Largest logit, NaN ignored.
  float largest(const Row<T>& row) const;

  // Given the largest logit, writes the softmax to `out` (which may be the row itself)
  // and draws from it at u. -1 if `largest` is not finite: nothing is written then.
  int64_t sample(const Row<T>& row, float largest, double u, float* out);

  float max() const { return max_; }

  // After normalise: sum of exp(z - max), so at least 1.
  double total() const { return total_; }

 private:
  int64_t blocks(const Row<T>& row) const { return (row.size + kBlock - 1) / kBlock; }
  int64_t length(const Row<T>& row, int64_t block) const;
  void weights(const Row<T>& row, int64_t block, float* w) const;
  void sort_support(const float* q, const int32_t* support, int64_t n, int64_t size);
  double subtract(const Row<T>& row, int64_t block, const float* q, bool sparse,
                  float scale, float* w) const;
  int64_t find_block(int64_t count, double target, double* before) const;
  // Inverse CDF over mass_; fill(block, w) gives a block's weights again.
  template <typename Fill>
  int64_t pick(const Row<T>& row, double u, double total, Fill&& fill) const;

  const KernelTable& kernels_;
  const RowKernels<T>& row_kernels_;
  bool parallel_;
  float max_ = 0;
  double total_ = 0;
  float inv_total_ = 0;
  std::vector<BlockStats> stats_;
  std::vector<double> mass_;    // per block, of the distribution being drawn from
  std::vector<int64_t> start_;  // per block, into the sorted support
  std::vector<int32_t> ids_;    // support sorted by block
  std::vector<float> sorted_q_;
};

}  // namespace dspark
