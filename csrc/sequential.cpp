#include "sequential.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>

#include "rejection.h"
#include "row_scan.h"
#include "step.h"
#include "topk.h"

namespace dspark {
namespace {

constexpr float kNegInf = -INFINITY;

// Multiply-adds of a step below which waking a team costs more than it saves.
constexpr int64_t kParallelWork = 1 << 18;

// W: type of the weights, B: type of the base logits.
template <typename W, typename B>
class Loop {
 public:
  Loop(const KernelTable& kernels, Head& head, const DraftArgs& args)
      : kernels_(kernels),
        head_(head),
        a_(args),
        width_(args.topk ? args.topk : head.draft_vocab),
        latents_(kernels, head, args),
        previous_(args.anchors, args.anchors + args.requests),
        bad_(new std::atomic<bool>[args.requests]) {
    for (int64_t r = 0; r < a_.requests; ++r) bad_[r] = false;
  }

  void run() {
    if (a_.topk == 0) {
      if (head_.type != HeadType::kNone) head_.pack();
      reserve_logits();
      best_.resize(max_threads() * a_.requests * kTile);
      index_.resize(best_.size());
    } else {
      candidates_.resize(a_.requests * a_.positions * width_);
    }
    parallel_team(step_work() >= kParallelWork,
                  [&](int thread, int team) { work(thread, team); });
    for (int64_t r = 0; r < a_.requests; ++r) a_.finite[r] = !bad_[r];
  }

 private:
  int64_t step_work() const {
    // Choosing candidates reads a logit of every position: worth a few multiplications.
    const int64_t per_request = a_.topk ? width_ * head_.rank + 4 * head_.draft_vocab
                                        : head_.draft_vocab * (head_.rank + 4);
    return a_.requests * per_request;
  }

  // One persistent region: barriers separate the phases of a step.
  void work(int thread, int team) {
    RowScan<float> scan(kernels_, width_, false);
    std::vector<float> row(a_.topk ? width_ : 0);
    const Range mine = share(a_.requests, thread, team);
    if (a_.topk) {
      choose_candidates(thread, team);
      team_barrier(team);
    }
    for (int64_t k = 0; k < a_.positions; ++k) {
      for (int64_t r = mine.begin; r < mine.end; ++r) {
        if (!latents_.update(r, k, previous_[r])) bad_[r] = true;
      }
      if (a_.topk == 0) {
        team_barrier(team);
        vocabulary(k, thread, team);
        team_barrier(team);
      }
      for (int64_t r = mine.begin; r < mine.end; ++r) {
        if (a_.topk) candidate_logits(r, k, row.data());
        const int64_t pick =
            a_.topk == 0 && is_greedy(r)
                ? merge_argmax(r, team)
                : choose(r, k, a_.topk ? row.data() : logits(r, k), &scan);
        emit(r, k, pick);
      }
    }
  }

  bool is_greedy(int64_t r) const {
    return a_.temperature == nullptr || !(a_.temperature[r] >= kGreedyTemperature);
  }

  const B* base(int64_t r, int64_t k) const {
    return static_cast<const B*>(a_.base) + r * a_.base_strides[0] +
           k * a_.base_strides[1];
  }

  // Sampled rows keep the logits of the step: in the probabilities to be returned, or
  // in scratch that lives as long as the thread, for fresh pages cost more than the
  // step.
  void reserve_logits() {
    static thread_local std::vector<float> scratch;
    if (a_.probs != nullptr || a_.temperature == nullptr) return;
    const size_t size = a_.requests * head_.draft_vocab;
    if (scratch.size() < size) scratch.resize(size);
    scratch_ = scratch.data();
  }

  float* logits(int64_t r, int64_t k) {
    return a_.probs ? a_.probs + (r * a_.positions + k) * width_
                    : scratch_ + r * head_.draft_vocab;
  }

  void choose_candidates(int thread, int team) {
    TopK topk(kernels_);
    const Range range = share(a_.requests * a_.positions, thread, team);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int64_t r = i / a_.positions;
      const B* x = base(r, i % a_.positions);
      if (rows(kernels_, x).has_nan(x, head_.draft_vocab)) bad_[r] = true;
      topk.select(x, head_.draft_vocab, width_, candidates_.data() + i * width_);
    }
  }

  void candidate_logits(int64_t r, int64_t k, float* out) {
    const int32_t* ids = candidates_.data() + (r * a_.positions + k) * width_;
    const B* x = base(r, k);
    const W* w2 = static_cast<const W*>(head_.w2);
    const auto dot = rows(kernels_, static_cast<const W*>(nullptr)).dot;
    for (int64_t j = 0; j < width_; ++j) {
      out[j] = to_float(x[ids[j]]);
      if (w2) out[j] += dot(w2 + ids[j] * head_.rank, latents_.f32(r), head_.rank);
    }
    if (kernels_.f32.has_nan(out, width_)) bad_[r] = true;
  }

  // The thread's share of the vocabulary for all requests: W2 is read once a step.
  void vocabulary(int64_t k, int thread, int team) {
    float* best = best_.data() + thread * a_.requests * kTile;
    int32_t* index = index_.data() + thread * a_.requests * kTile;
    std::fill(best, best + a_.requests * kTile, kNegInf);
    std::fill(index, index + a_.requests * kTile, 0);
    constexpr int64_t kGroup = 12;  // requests per call: their logits stay in L1
    float out[kGroup * kPanel];
    const Range range = share(head_.panels(), thread, team);
    for (int64_t p = range.begin; p < range.end; ++p) {
      for (int64_t r0 = 0; r0 < a_.requests; r0 += kGroup) {
        const int64_t n = std::min(kGroup, a_.requests - r0);
        bias(p, r0, n, out);
        for (int64_t r = r0; r < r0 + n; ++r) {
          float* x = out + (r - r0) * kPanel;
          finish_panel(r, k, p, x, best + r * kTile, index + r * kTile);
        }
      }
    }
  }

  void bias(int64_t panel, int64_t first, int64_t n, float* out) {
    if (head_.type == HeadType::kNone) {
      std::fill(out, out + n * kPanel, 0.0f);
      return;
    }
    const int64_t rank = latents_.stride();
    const W* packed =
        head_.packed_data(static_cast<const W*>(nullptr)) + panel * kPanel * rank;
    if constexpr (sizeof(W) == 2) {
      if (kernels_.panel_bf16 != nullptr) {
        kernels_.panel_bf16(packed, rank, latents_.bf16(first), rank, n, out);
        return;
      }
    }
    rows(kernels_, packed).panel(packed, rank, latents_.f32(first), rank, n, out);
  }

  void finish_panel(int64_t r, int64_t k, int64_t panel, float* x, float* best,
                    int32_t* index) {
    const int64_t v0 = panel * kPanel;
    const int64_t n = std::min(kPanel, head_.draft_vocab - v0);
    const B* b = base(r, k) + v0;
    for (int64_t i = 0; i < n; ++i) x[i] += to_float(b[i]);
    for (int64_t i = n; i < kPanel; ++i) x[i] = kNegInf;
    if (is_greedy(r)) {
      if (kernels_.argmax(x, static_cast<int32_t>(v0), best, index)) bad_[r] = true;
      return;
    }
    if (kernels_.f32.has_nan(x, n)) bad_[r] = true;
    std::memcpy(logits(r, k) + v0, x, n * sizeof(float));
  }

  // Best of all threads and lanes, the lowest index among equals.
  int64_t merge_argmax(int64_t r, int team) {
    float best = kNegInf;
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

  // Chooses from complete logits; turns them into probabilities where asked for.
  int64_t choose(int64_t r, int64_t k, const float* x, RowScan<float>* scan) {
    const Row<float> row = {x, width_, is_greedy(r) ? 1.0f : 1.0f / a_.temperature[r]};
    if (is_greedy(r)) {
      const int64_t best = scan->argmax(row);
      if (!std::isfinite(x[best])) bad_[r] = true;
      return best;
    }
    if (!scan->normalise(row)) {
      bad_[r] = true;
      return scan->argmax(row);
    }
    const int64_t pick = scan->draw(row, a_.uniforms[r * a_.positions + k]);
    if (a_.probs) {
      scan->probabilities(row, a_.probs + (r * a_.positions + k) * width_);
    }
    return pick;
  }

  // `pick` is a draft id, or with topk an index into the candidates.
  void emit(int64_t r, int64_t k, int64_t pick) {
    const int64_t at = r * a_.positions + k;
    if (a_.probs && is_greedy(r)) {
      std::fill(a_.probs + at * width_, a_.probs + (at + 1) * width_, 0.0f);
      a_.probs[at * width_ + pick] = 1.0f;
    }
    const int32_t* map = head_.draft_to_target;
    if (a_.topk) {
      const int32_t* ids = candidates_.data() + at * width_;
      for (int64_t j = 0; a_.support && j < width_; ++j) {
        a_.support[at * width_ + j] = map ? map[ids[j]] : ids[j];
      }
      pick = ids[pick];
    }
    previous_[r] = a_.token_ids[at] = map ? map[pick] : pick;
  }

  const KernelTable& kernels_;
  Head& head_;
  const DraftArgs& a_;
  const int64_t width_;  // columns of a distribution
  Latents<W> latents_;
  std::vector<int64_t> previous_;
  std::unique_ptr<std::atomic<bool>[]> bad_;
  std::vector<int32_t> candidates_;  // [requests, positions, topk]
  std::vector<float> best_;          // [threads, requests, 16]
  std::vector<int32_t> index_;
  float* scratch_ = nullptr;
};

template <typename W>
void run(const KernelTable& kernels, Head& head, const DraftArgs& args) {
  if (args.base_bf16) {
    Loop<W, uint16_t>(kernels, head, args).run();
  } else {
    Loop<W, float>(kernels, head, args).run();
  }
}

}  // namespace

void draft_sequential(const KernelTable& kernels, Head& head, const DraftArgs& args) {
  if (head.bf16) {
    run<uint16_t>(kernels, head, args);
  } else {
    run<float>(kernels, head, args);
  }
}

}  // namespace dspark
