#include "row_scan.h"

#include <algorithm>
#include <cmath>

namespace dspark {
namespace {

// A residual with less mass than this is rounding noise of p - q: draw from p. Such a
// rejection happens with at most this probability, which bounds the bias.
constexpr double kResidualFloor = 1e-6;
constexpr float kCutoff = -87.0f;  // see kernels.h

}  // namespace

int64_t search_block(const float* w, int64_t n, double before, double target) {
  int64_t last = -1;
  for (int64_t i = 0; i < n; ++i) {
    if (!(w[i] > 0.0f)) continue;
    last = i;
    before += static_cast<double>(w[i]);
    if (before > target) return i;
  }
  return last;
}

template <typename T>
RowScan<T>::RowScan(const KernelTable& kernels, int64_t max_size, bool parallel)
    : kernels_(kernels),
      row_kernels_(rows(kernels, static_cast<const T*>(nullptr))),
      parallel_(parallel),
      stats_((max_size + kBlock - 1) / kBlock),
      mass_(stats_.size()),
      start_(stats_.size() + 1) {}

template <typename T>
int64_t RowScan<T>::length(const Row<T>& row, int64_t block) const {
  return std::min(kBlock, row.size - block * kBlock);
}

template <typename T>
int64_t RowScan<T>::argmax(const Row<T>& row) {
  const int64_t count = blocks(row);
  parallel_team(parallel_, [&](int thread, int team) {
    const Range range = share(count, thread, team);
    for (int64_t b = range.begin; b < range.end; ++b) {
      stats_[b].max = row_kernels_.max(row.data + b * kBlock, length(row, b), 1.0f);
    }
  });
  int64_t best = 0;
  for (int64_t b = 1; b < count; ++b) {
    if (stats_[b].max > stats_[best].max) best = b;
  }
  const T* x = row.data + best * kBlock;
  for (int64_t i = 0; i < length(row, best); ++i) {
    if (to_float(x[i]) == stats_[best].max) return best * kBlock + i;
  }
  return 0;  // only NaN
}

template <typename T>
bool RowScan<T>::normalise(const Row<T>& row) {
  const int64_t count = blocks(row);
  parallel_team(parallel_, [&](int thread, int team) {
    const Range range = share(count, thread, team);
    for (int64_t b = range.begin; b < range.end; ++b) {
      stats_[b] = row_kernels_.stats(row.data + b * kBlock, length(row, b), row.inv_t);
    }
  });
  max_ = stats_[0].max;
  for (int64_t b = 1; b < count; ++b) max_ = std::max(max_, stats_[b].max);
  if (!std::isfinite(max_)) return false;
  total_ = 0;
  for (int64_t b = 0; b < count; ++b) {
    const float gap = stats_[b].max - max_;
    mass_[b] = gap < kCutoff ? 0.0 : stats_[b].sum * std::exp(double(gap));
    total_ += mass_[b];
  }
  inv_total_ = static_cast<float>(1.0 / total_);
  return true;
}

template <typename T>
float RowScan<T>::probability(const Row<T>& row, int64_t id) const {
  float w;
  row_kernels_.weights(row.data + id, 1, row.inv_t, max_, &w);
  return w * inv_total_;
}

template <typename T>
void RowScan<T>::weights(const Row<T>& row, int64_t block, float* w) const {
  row_kernels_.weights(row.data + block * kBlock, length(row, block), row.inv_t, max_,
                       w);
}

// The block in which the cumulative mass passes `target`, else the last with any, else
// -1; *before is the mass of those in front of it.
template <typename T>
int64_t RowScan<T>::find_block(int64_t count, double target, double* before) const {
  *before = 0;
  int64_t block = -1;
  for (int64_t b = 0; b < count; ++b) {
    if (!(mass_[b] > 0)) continue;
    block = b;
    if (*before + mass_[b] > target) break;
    *before += mass_[b];
  }
  return block;
}

template <typename T>
template <typename Fill>
int64_t RowScan<T>::pick(const Row<T>& row, double u, double total, Fill&& fill) const {
  const double target = u * total;
  double before;
  int64_t block = find_block(blocks(row), target, &before);
  float w[kBlock];
  // A block's mass and its weights are rounded differently: a block whose mass is all
  // rounding passes the draw on to the one before.
  for (; block >= 0; --block) {
    fill(block, w);
    const int64_t i = search_block(w, length(row, block), before, target);
    if (i >= 0) return block * kBlock + i;
  }
  return 0;
}

template <typename T>
int64_t RowScan<T>::draw(const Row<T>& row, double u) {
  return pick(row, u, total_, [&](int64_t b, float* w) { weights(row, b, w); });
}

template <typename T>
int64_t RowScan<T>::draw_without(const Row<T>& row, int64_t id, double u) {
  if (id < 0 || id >= row.size) return draw(row, u);
  const int64_t home = id / kBlock;
  const auto fill = [&](int64_t b, float* w) {
    weights(row, b, w);
    if (b == home) w[id - home * kBlock] = 0.0f;
  };
  float w[kBlock];
  fill(home, w);
  const double kept = mass_[home];
  mass_[home] = kernels_.sum(w, length(row, home));
  double total = 0;
  for (int64_t b = 0; b < blocks(row); ++b) total += mass_[b];
  if (total > 0) return pick(row, u, total, fill);
  mass_[home] = kept;
  return draw(row, u);
}

// Counting sort of the support by block; ids outside [0, size) are padding.
template <typename T>
void RowScan<T>::sort_support(const float* q, const int32_t* support, int64_t n,
                              int64_t size) {
  std::fill(start_.begin(), start_.end(), 0);
  for (int64_t j = 0; j < n; ++j) {
    if (support[j] >= 0 && support[j] < size) ++start_[support[j] / kBlock + 1];
  }
  for (size_t b = 1; b < start_.size(); ++b) start_[b] += start_[b - 1];
  ids_.resize(n);
  sorted_q_.resize(n);
  std::vector<int64_t> next(start_.begin(), start_.end() - 1);
  for (int64_t j = 0; j < n; ++j) {
    if (support[j] < 0 || support[j] >= size) continue;
    const int64_t at = next[support[j] / kBlock]++;
    ids_[at] = support[j];
    sorted_q_[at] = q[j];
  }
}

// w = max(0, scale * w - q) of one block; returns its sum.
template <typename T>
double RowScan<T>::subtract(const Row<T>& row, int64_t block, const float* q,
                            bool sparse, float scale, float* w) const {
  weights(row, block, w);
  const int64_t n = length(row, block);
  if (!sparse) return kernels_.residual(w, q + block * kBlock, n, scale);
  kernels_.scale(w, n, scale);
  for (int64_t j = start_[block]; j < start_[block + 1]; ++j) {
    float& p = w[ids_[j] - block * kBlock];
    p = std::max(p - sorted_q_[j], 0.0f);
  }
  return kernels_.sum(w, n);
}

template <typename T>
double RowScan<T>::residual_mass(const Row<T>& row, const float* q,
                                 const int32_t* support, int64_t support_size,
                                 float ratio) {
  const bool sparse = support != nullptr;
  if (sparse) sort_support(q, support, support_size, row.size);
  const int64_t count = blocks(row);
  const float scale = ratio * inv_total_;
  parallel_team(parallel_, [&](int thread, int team) {
    float w[kBlock];
    const Range range = share(count, thread, team);
    for (int64_t b = range.begin; b < range.end; ++b) {
      const bool untouched = sparse && start_[b] == start_[b + 1];
      mass_[b] = untouched ? mass_[b] * scale : subtract(row, b, q, sparse, scale, w);
    }
  });
  double total = 0;
  for (int64_t b = 0; b < count; ++b) total += mass_[b];
  return total;
}

template <typename T>
int64_t RowScan<T>::draw_residual(const Row<T>& row, const float* q,
                                  const int32_t* support, int64_t support_size,
                                  float ratio, double u) {
  const std::vector<double> kept(mass_.begin(), mass_.begin() + blocks(row));
  const double total = residual_mass(row, q, support, support_size, ratio);
  if (total > kResidualFloor) {
    const float scale = ratio * inv_total_;
    return pick(row, u, total, [&](int64_t b, float* w) {
      subtract(row, b, q, support != nullptr, scale, w);
    });
  }
  std::copy(kept.begin(), kept.end(), mass_.begin());
  return draw(row, u);
}

template <typename T>
float RowScan<T>::largest(const Row<T>& row) const {
  float m = -INFINITY;
  for (int64_t b = 0; b < blocks(row); ++b) {
    m = std::max(m, row_kernels_.max(row.data + b * kBlock, length(row, b), 1.0f));
  }
  return m;
}

// Each weight is computed once, where normalise, draw and a softmax would each do so.
template <typename T>
int64_t RowScan<T>::sample(const Row<T>& row, float largest, double u, float* out) {
  const int64_t count = blocks(row);
  max_ = largest * row.inv_t;
  if (!std::isfinite(max_)) return -1;
  total_ = 0;
  for (int64_t b = 0; b < count; ++b) {
    float* w = out + b * kBlock;
    weights(row, b, w);
    mass_[b] = kernels_.sum(w, length(row, b));
    total_ += mass_[b];
  }
  inv_total_ = static_cast<float>(1.0 / total_);
  double before;
  const double target = u * total_;
  const int64_t block = find_block(count, target, &before);
  int64_t pick = 0;  // only NaN
  if (block >= 0) {
    const float* w = out + block * kBlock;
    pick = block * kBlock + search_block(w, length(row, block), before, target);
  }
  kernels_.scale(out, row.size, inv_total_);
  return pick;
}

template class RowScan<float>;
template class RowScan<uint16_t>;

}  // namespace dspark
