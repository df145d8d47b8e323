// The product with W2 over the whole draft vocabulary, for all requests at once: the
// argmax of greedy rows as it goes, the logits of those that keep them. Only for
// sequential.cpp.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "step.h"

namespace dspark {
namespace {

// W: type of the weights, B: type of the base logits.
template <typename W, typename B>
class Vocabulary {
 public:
  // bad: [requests], set where a logit is NaN.
  Vocabulary(const KernelTable& kernels, Head& head, const DraftArgs& args,
             const Latents<W>& latents, std::atomic<bool>* bad)
      : kernels_(kernels), head_(head), a_(args), latents_(latents), bad_(bad) {
    if (head_.type == HeadType::kNone || a_.topk) return;
    head_.pack();
    if (sizeof(W) == 2 && kernels.tiles != nullptr &&
        a_.requests >= kernels.tiles->min_requests) {
      tiles_ = kernels.tiles;
    }
    const int64_t most = tiles_ ? tiles_->max_requests : kGroup;
    const int64_t groups = (a_.requests + most - 1) / most;
    group_ = (a_.requests + groups - 1) / groups;
  }

  void reserve(int team) {
    best_.resize(team * a_.requests * kTile);
    index_.resize(best_.size());
    reserve_logits();
  }

  // The thread's share of the vocabulary for all requests: W2 is read once a step.
  void run(int64_t k, int thread, int team) {
    float* best = best_.data() + thread * a_.requests * kTile;
    int32_t* index = index_.data() + thread * a_.requests * kTile;
    std::fill(best, best + a_.requests * kTile, -INFINITY);
    std::fill(index, index + a_.requests * kTile, 0);
    alignas(64) float out[kMaxGroup * kPanel] = {};
    alignas(64) char saved[64];
    const Range range = share(head_.panels(), thread, team);
    if (tiles_) {
      tiles_->begin(group_, saved);
      count_tile_call();
    }
    for (int64_t p = range.begin; p < range.end; ++p) {
      for (int64_t r0 = 0; r0 < a_.requests; r0 += group_) {
        // A last group that is not full begins earlier.
        const int64_t first = std::min(r0, a_.requests - group_);
        bias(p, first, out);
        for (int64_t r = r0; r < first + group_; ++r) {
          float* x = out + (r - first) * kPanel;
          finish_panel(r, k, p, x, best + r * kTile, index + r * kTile);
        }
      }
    }
    if (tiles_) tiles_->end(saved);
  }

  // Largest logit of a sampled row, NaN ignored.
  float merge_max(int64_t r, int team) const {
    float best = -INFINITY;
    for (int t = 0; t < team; ++t) {
      const float* lanes = best_.data() + (t * a_.requests + r) * kTile;
      best = std::max(best, *std::max_element(lanes, lanes + kTile));
    }
    return best;
  }

  // Of a greedy row: best of all threads and lanes, the lowest index among equals.
  int64_t merge_argmax(int64_t r, int team) {
    float best = -INFINITY;
    int32_t index = 0;
    for (int t = 0; t < team; ++t) {
      const int64_t at = (t * a_.requests + r) * kTile;
      for (int64_t i = at; i < at + kTile; ++i) {
        if (best_[i] > best || (best_[i] == best && index_[i] < index)) {
          best = best_[i];
          index = index_[i];
        }
      }
    }
    if (!std::isfinite(best)) bad_[r] = true;
    return index;
  }

  // Of a row that keeps them, after `run` and until the next; the caller may overwrite
  // them.
  float* logits(int64_t r) { return scratch_ + r * head_.draft_vocab; }

 private:
  static constexpr int64_t kGroup = 12;  // requests per call: their logits stay in L1
  static constexpr int64_t kMaxGroup = 32;

  // The logits of a step are kept in scratch that lives as long as the thread: it stays
  // in the cache from step to step, and fresh pages cost more than the step.
  void reserve_logits() {
    static thread_local std::vector<float> scratch;
    if (a_.temperature == nullptr && a_.certainty == nullptr) return;
    const size_t size = a_.requests * head_.draft_vocab;
    if (scratch.size() < size) scratch.resize(size);
    scratch_ = scratch.data();
  }

  void bias(int64_t panel, int64_t first, float* out) {
    if (head_.type == HeadType::kNone) return;  // stays zero
    const int64_t rank = latents_.stride();
    const W* packed =
        head_.packed_data(static_cast<const W*>(nullptr)) + panel * kPanel * rank;
    if constexpr (sizeof(W) == 2) {
      if (tiles_) {
        tiles_->panel(packed, rank, latents_.bf16(first), group_, out);
        return;
      }
      if (kernels_.panel_bf16 != nullptr) {
        kernels_.panel_bf16(packed, rank, latents_.bf16(first), rank, group_, out);
        return;
      }
    }
    rows(kernels_, packed).panel(packed, rank, latents_.f32(first), rank, group_, out);
  }

  template <typename T>
  static void fetch_ahead(const T* x) {
    const char* line = reinterpret_cast<const char*>(x);
    for (size_t i = 0; i < kPanel * sizeof(T); i += 64) {
      __builtin_prefetch(line + i, 0, 2);
    }
  }

  void finish_panel(int64_t r, int64_t k, int64_t panel, const float* x, float* best,
                    int32_t* index) {
    const int64_t v0 = panel * kPanel;
    const int64_t n = std::min(kPanel, head_.draft_vocab - v0);
    const B* b = base<B>(a_, r, k) + v0;
    const RowKernels<B>& kernels = rows(kernels_, b);
    // Rows lie far apart: no hardware prefetcher sees that the next panel comes next.
    // Beyond the last one a prefetch does nothing.
    fetch_ahead(b + kPanel);
    bool nan = false;
    if (is_greedy(a_, r)) {
      nan = kernels.argmax_panel(x, b, n, static_cast<int32_t>(v0), best, index);
      alignas(64) float unused[kTile] = {};  // lanes' maxima: `best` has them
      if (keeps_logits(a_, r)) kernels.add_panel(x, b, n, unused, logits(r) + v0);
    } else {
      nan = kernels.add_panel(x, b, n, best, logits(r) + v0);
    }
    if (nan) bad_[r] = true;
  }

  const KernelTable& kernels_;
  Head& head_;
  const DraftArgs& a_;
  const Latents<W>& latents_;
  std::atomic<bool>* bad_;
  const TileKernels* tiles_ = nullptr;
  int64_t group_ = 1;
  std::vector<float> best_;  // [threads, requests, 16]
  std::vector<int32_t> index_;
  float* scratch_ = nullptr;
};

}  // namespace
}  // namespace dspark
