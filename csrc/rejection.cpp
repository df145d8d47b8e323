#include "rejection.h"

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "row_scan.h"

namespace dspark {
namespace {

template <typename T>
class Sampler {
 public:
  Sampler(const KernelTable& kernels, const RejectionArgs& args, bool parallel)
      : a_(args), scan_(kernels, args.vocab, parallel) {}

  // `first` is the number of draft rows before this request's.
  void request(int64_t r, int64_t first) {
    int32_t* out = a_.token_ids + r * a_.width;
    std::fill(out, out + a_.width, -1);
    const float t = a_.temperature ? a_.temperature[r] : 0.0f;
    const bool greedy = t < kGreedyTemperature;
    const float inv_t = greedy ? 1.0f : 1.0f / t;
    if (a_.block && !greedy) {
      a_.num_emitted[r] = block(r, first, inv_t, out);
      return;
    }
    int64_t k = 0;
    for (bool more = true; more; ++k) {
      const Row<T> row = row_at(first + r + k, inv_t);
      const bool bonus = k == a_.lengths[r];
      if (greedy || !scan_.normalise(row)) {
        const int64_t best = scan_.argmax(row);
        out[k] = static_cast<int32_t>(best);
        more = !bonus && best == draft_id(first + k);
      } else if (bonus) {
        out[k] = static_cast<int32_t>(scan_.draw(row, a_.sample_uniforms[r]));
        more = false;
      } else {
        more = random_step(row, r, first + k, out + k);
      }
    }
    a_.num_emitted[r] = static_cast<int32_t>(k);
  }

 private:
  Row<T> row_at(int64_t i, float inv_t) const {
    return {static_cast<const T*>(a_.logits) + i * a_.logits_stride, a_.vocab, inv_t};
  }

  int64_t draft_id(int64_t i) const {
    return a_.ids64 ? static_cast<const int64_t*>(a_.draft_ids)[i]
                    : static_cast<const int32_t*>(a_.draft_ids)[i];
  }

  const int32_t* support(int64_t i) const {
    return a_.support ? a_.support + i * a_.support_stride : nullptr;
  }

  float draft_prob(int64_t i, int64_t id) const {
    if (a_.draft_probs == nullptr) return 1.0f;
    const float* q = a_.draft_probs + i * a_.probs_stride;
    if (a_.support == nullptr) return q[id];
    const int32_t* ids = support(i);
    float sum = 0;
    for (int64_t j0 = 0; j0 < a_.support_size; j0 += 256) {
      const int64_t end = std::min(j0 + 256, a_.support_size);
      int32_t hit = 0;  // an integer reduction, for the compiler to vectorise
      for (int64_t j = j0; j < end; ++j) hit |= ids[j] == id;
      for (int64_t j = j0; hit && j < end; ++j) sum += ids[j] == id ? q[j] : 0.0f;
    }
    return sum;
  }

  const float* draft_row(int64_t i) const {
    return a_.draft_probs ? a_.draft_probs + i * a_.probs_stride : nullptr;
  }

  // p and q of draft i in a normalised row; zeros if it is no token.
  std::pair<float, float> pair(const Row<T>& row, int64_t i) const {
    const int64_t x = draft_id(i);
    if (x < 0 || x >= a_.vocab) return {0.0f, 0.0f};
    return {scan_.probability(row, x), draft_prob(i, x)};
  }

  // A draw from the residual of draft i.
  int32_t residual(const Row<T>& row, int64_t r, int64_t i, float ratio) {
    const double u = a_.sample_uniforms[r];
    return static_cast<int32_t>(a_.draft_probs == nullptr
                                    ? scan_.draw_without(row, draft_id(i), u)
                                    : scan_.draw_residual(row, draft_row(i), support(i),
                                                          a_.support_size, ratio, u));
  }

  // Accepts the draft (true) or emits a draw from the residual (false).
  bool random_step(const Row<T>& row, int64_t r, int64_t i, int32_t* out) {
    const auto [p, q] = pair(row, i);
    const bool accepted = q > 0 && a_.accept_uniforms[i] * double(q) < double(p);
    *out = accepted ? static_cast<int32_t>(draft_id(i)) : residual(row, r, i, 1.0f);
    return accepted;
  }

  // Block verification of a request that is not greedy; how many tokens it emits. A row
  // that is no distribution ends the block. See rejection_reference.py.
  int32_t block(int64_t r, int64_t first, float inv_t, int32_t* out) {
    const double* u = a_.accept_uniforms + first;
    double ratio = 1.0, accepted_ratio = 1.0;
    int64_t accepted = 0, end = a_.lengths[r];
    for (int64_t k = 0; k < end && ratio > 0; ++k) {
      const Row<T> row = row_at(first + r + k, inv_t);
      if (!scan_.normalise(row)) {
        end = k;
        break;
      }
      const auto [p, q] = pair(row, first + k);
      if (k > 0 && u[k - 1] < threshold(row, first + k, p, ratio)) {
        accepted = k;
        accepted_ratio = ratio;
      }
      ratio = q > 0 ? std::min(ratio * (double(p) / double(q)), 1.0) : 0.0;
    }
    if (end > 0 && u[end - 1] < ratio) accepted = end;
    for (int64_t k = 0; k < accepted; ++k) {
      out[k] = static_cast<int32_t>(draft_id(first + k));
    }
    const Row<T> row = row_at(first + r + accepted, inv_t);
    int32_t* last = out + accepted;
    if (!scan_.normalise(row)) {
      *last = static_cast<int32_t>(scan_.argmax(row));
    } else if (accepted < end) {
      *last = residual(row, r, first + accepted, static_cast<float>(accepted_ratio));
    } else {
      *last = static_cast<int32_t>(scan_.draw(row, a_.sample_uniforms[r]));
    }
    return static_cast<int32_t>(accepted + 1);
  }

  // The uniform number below which the drafts before i may be accepted.
  double threshold(const Row<T>& row, int64_t i, float p, double ratio) {
    const double mass =
        a_.draft_probs == nullptr
            ? ratio * (1.0 - double(p))
            : scan_.residual_mass(row, draft_row(i), support(i), a_.support_size,
                                  static_cast<float>(ratio));
    const double rest = mass + 1.0 - ratio;
    return rest > 0 ? mass / rest : 1.0;
  }

  const RejectionArgs& a_;
  RowScan<T> scan_;
};

// Logits below which waking a team costs more than it saves.
constexpr int64_t kParallelWork = 1 << 17;

// With fewer threads than this a row is not shared out: it saves tens of microseconds
// a row, and on busy cores a team waits milliseconds for its last thread.
constexpr int kRowTeam = 4;

template <typename T>
void run(const KernelTable& kernels, const RejectionArgs& args) {
  std::vector<int64_t> first(args.requests, 0);
  for (int64_t r = 1; r < args.requests; ++r) {
    first[r] = first[r - 1] + args.lengths[r - 1];
  }
  // One request: share out each row. Several: share out the requests, one at a time,
  // since how many rows each will read is not known.
  const bool parallel = (args.requests + 1) * args.vocab >= kParallelWork;
  if (args.requests < 2) {
    Sampler<T> sampler(kernels, args, parallel && max_threads() >= kRowTeam);
    for (int64_t r = 0; r < args.requests; ++r) sampler.request(r, first[r]);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_team(parallel, [&](int, int) {
    Sampler<T> sampler(kernels, args, false);
    for (int64_t r; (r = next.fetch_add(1)) < args.requests;) {
      sampler.request(r, first[r]);
    }
  });
}

}  // namespace

void rejection_sample(const KernelTable& kernels, const RejectionArgs& args) {
  if (args.bf16) {
    run<uint16_t>(kernels, args);
  } else {
    run<float>(kernels, args);
  }
}

}  // namespace dspark
