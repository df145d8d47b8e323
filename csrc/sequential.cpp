#include "sequential.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>

#include "row_scan.h"
#include "step.h"
#include "topk.h"
#include "vocabulary.h"

namespace dspark {
namespace {

// Multiply-adds of a step below which waking a team costs more than it saves.
constexpr int64_t kParallelWork = 1 << 18;
// Weight of all others against the likeliest, below which float32 sums say little.
constexpr double kLeastOthers = 1e-4;

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
        bad_(new std::atomic<bool>[args.requests]),
        vocabulary_(kernels, head, args, latents_, bad_.get()) {
    for (int64_t r = 0; r < a_.requests; ++r) bad_[r] = false;
  }

  void run() {
    if (a_.topk == 0) {
      vocabulary_.reserve(max_threads());
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
    std::vector<float> row(a_.topk ? width_ : 0), scratch(latents_.scratch_size());
    const Range mine = share(a_.requests, thread, team);
    if (a_.topk) {
      choose_candidates(thread, team);
      team_barrier(team);
    }
    for (int64_t k = 0; k < a_.positions; ++k) {
      for (int64_t r = mine.begin; r < mine.end; ++r) {
        if (!latents_.update(r, k, previous_[r], scratch.data())) bad_[r] = true;
      }
      if (a_.topk == 0) {
        team_barrier(team);
        vocabulary_.run(k, thread, team);
        team_barrier(team);
      }
      for (int64_t r = mine.begin; r < mine.end; ++r) {
        if (a_.topk) {
          candidate_logits(r, k, row.data());
          note_certainty(r, k, row.data(), &scan);
          emit(r, k, choose(r, k, row.data(), &scan));
          continue;
        }
        float* x = keeps_logits(a_, r) ? vocabulary_.logits(r) : nullptr;
        note_certainty(r, k, x, &scan);
        if (is_greedy(a_, r)) {
          emit(r, k, vocabulary_.merge_argmax(r, team));
        } else {
          emit(r, k, sample(r, k, x, vocabulary_.merge_max(r, team), &scan));
        }
      }
    }
  }

  void choose_candidates(int thread, int team) {
    TopK topk(kernels_);
    const Range range = share(a_.requests * a_.positions, thread, team);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int64_t r = i / a_.positions;
      const B* x = base<B>(a_, r, i % a_.positions);
      if (rows(kernels_, x).has_nan(x, head_.draft_vocab)) bad_[r] = true;
      topk.select(x, head_.draft_vocab, width_, candidates_.data() + i * width_);
    }
  }

  void candidate_logits(int64_t r, int64_t k, float* out) {
    const int32_t* ids = candidates_.data() + (r * a_.positions + k) * width_;
    const B* x = base<B>(a_, r, k);
    const W* w2 = static_cast<const W*>(head_.w2);
    const auto dot = rows(kernels_, static_cast<const W*>(nullptr)).dot;
    for (int64_t j = 0; j < width_; ++j) {
      out[j] = to_float(x[ids[j]]);
      if (w2) out[j] += dot(w2 + ids[j] * head_.rank, latents_.f32(r), head_.rank);
    }
    if (kernels_.f32.has_nan(out, width_)) bad_[r] = true;
  }

  int64_t choose(int64_t r, int64_t k, float* x, RowScan<float>* scan) {
    const Row<float> row = {x, width_, 1.0f};
    if (!is_greedy(a_, r)) return sample(r, k, x, scan->largest(row), scan);
    const int64_t best = scan->argmax(row);
    if (!std::isfinite(x[best])) bad_[r] = true;
    return best;
  }

  // Log-odds of the likeliest token at temperature 1, before anything is drawn.
  void note_certainty(int64_t r, int64_t k, const float* x, RowScan<float>* scan) {
    if (a_.certainty == nullptr) return;
    const bool sound = scan->normalise({x, width_, 1.0f});
    const double others = sound ? std::max(scan->total() - 1.0, kLeastOthers) : NAN;
    a_.certainty[r * a_.positions + k] = static_cast<float>(-std::log(others));
  }

  // Draws from complete logits and overwrites them, or with topk those to be returned,
  // with the probabilities.
  int64_t sample(int64_t r, int64_t k, float* x, float largest, RowScan<float>* scan) {
    const Row<float> row = {x, width_, 1.0f / a_.temperature[r]};
    float* out = a_.probs ? a_.probs + (r * a_.positions + k) * width_ : x;
    const double u = a_.uniforms[r * a_.positions + k];
    const int64_t pick = scan->sample(row, largest, u, out);
    if (pick >= 0) return pick;
    bad_[r] = true;
    return scan->argmax(row);
  }

  // `pick` is a draft id, or with topk an index into the candidates.
  void emit(int64_t r, int64_t k, int64_t pick) {
    const int64_t at = r * a_.positions + k;
    if (a_.probs && is_greedy(a_, r)) {
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
  Vocabulary<W, B> vocabulary_;
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

namespace {
std::atomic<int64_t> g_tile_calls{0};
}

int64_t tile_calls() { return g_tile_calls.load(std::memory_order_relaxed); }
void count_tile_call() { g_tile_calls.fetch_add(1, std::memory_order_relaxed); }

void draft_sequential(const KernelTable& kernels, Head& head, const DraftArgs& args) {
  if (head.bf16) {
    run<uint16_t>(kernels, head, args);
  } else {
    run<float>(kernels, head, args);
  }
}

}  // namespace dspark
