#include <exception>
#include <vector>

#include "bindings.h"
#include "rejection.h"

namespace dspark {
namespace {

// Lengths as int64; raises unless each is in [0, width) and they add up to drafts.
std::vector<int64_t> read_lengths(const Tensor& t, int64_t drafts, int64_t width) {
  std::vector<int64_t> lengths(t.shape[0]);
  int64_t total = 0;
  for (int64_t r = 0; r < t.shape[0]; ++r) {
    lengths[r] = t.dtype == DType::kI32 ? t.as<int32_t>()[r] : t.as<int64_t>()[r];
    if (lengths[r] < 0 || lengths[r] >= width) {
      throw Error{PyExc_ValueError, "num_draft_tokens[" + std::to_string(r) +
                                        "] = " + std::to_string(lengths[r]) +
                                        " is outside [0, " + std::to_string(width) +
                                        ") given by token_ids"};
    }
    total += lengths[r];
  }
  if (total != drafts) {
    throw Error{PyExc_ValueError,
                "num_draft_tokens adds up to " + std::to_string(total) +
                    " but draft_token_ids has shape [" + std::to_string(drafts) + "]"};
  }
  return lengths;
}

void read_probs(PyObject* probs, PyObject* ids, int64_t drafts, RejectionArgs* a) {
  const Tensor q =
      optional(probs, {"draft_probs", {DType::kF32}, {drafts, kAny}, false});
  if (!q.defined()) {
    if (ids != Py_None) {
      throw Error{PyExc_ValueError, "draft_support needs draft_probs"};
    }
    return;
  }
  a->draft_probs = q.as<float>();
  a->probs_stride = q.strides[0];
  a->support_size = q.shape[1];
  const Tensor s =
      optional(ids, {"draft_support", {DType::kI32}, {kAny, a->support_size}, false});
  if (!s.defined()) {
    require(probs, {"draft_probs", {DType::kF32}, {drafts, a->vocab}, false});
    return;
  }
  if (s.shape[0] != 1 && s.shape[0] != drafts) {
    throw Error{PyExc_ValueError, "draft_support: expected 1 or " +
                                      std::to_string(drafts) + " rows, got shape [" +
                                      std::to_string(s.shape[0]) + ", " +
                                      std::to_string(s.shape[1]) + "]"};
  }
  a->support = s.as<int32_t>();
  a->support_stride = s.shape[0] == 1 ? 0 : s.strides[0];
}

void read_random(PyObject* const* args, int64_t drafts, RejectionArgs* a) {
  const Tensor t = optional(args[0], {"temperature", {DType::kF32}, {a->requests}});
  const Tensor u = optional(args[1], {"accept_uniforms", {DType::kF64}, {drafts}});
  const Tensor s = optional(args[2], {"sample_uniforms", {DType::kF64}, {a->requests}});
  a->temperature = t.as<float>();
  a->accept_uniforms = u.as<double>();
  a->sample_uniforms = s.as<double>();
  if (!t.defined()) return;
  for (int64_t r = 0; r < a->requests; ++r) {
    if (a->temperature[r] < kGreedyTemperature) continue;
    if (!u.defined() || !s.defined()) {
      throw Error{PyExc_ValueError,
                  "accept_uniforms of shape [" + std::to_string(drafts) +
                      "] and sample_uniforms of shape [" + std::to_string(a->requests) +
                      "] are needed: request " + std::to_string(r) + " is not greedy"};
    }
  }
}

}  // namespace

// (target_logits, draft_token_ids, num_draft_tokens, draft_probs, draft_support,
//  temperature, accept_uniforms, sample_uniforms, out token_ids, out num_emitted,
//  block)
PyObject* py_rejection_sample(PyObject*, PyObject* const* args, Py_ssize_t n) {
  return guarded([&]() -> PyObject* {
    require_count("rejection_sample", n, 11);
    const Tensor drafts =
        require(args[1], {"draft_token_ids", {DType::kI32, DType::kI64}, {kAny}});
    const Tensor counts =
        require(args[2], {"num_draft_tokens", {DType::kI32, DType::kI64}, {kAny}});
    const int64_t num_drafts = drafts.shape[0], requests = counts.shape[0];
    const Tensor logits = require(args[0], {"target_logits",
                                            {DType::kF32, DType::kBf16},
                                            {num_drafts + requests, kAny},
                                            false});
    const Tensor out = require(args[8], {"token_ids", {DType::kI32}, {requests, kAny}});
    const Tensor emitted = require(args[9], {"num_emitted", {DType::kI32}, {requests}});
    if (logits.shape[1] < 1 || logits.shape[1] > INT32_MAX) {
      throw Error{PyExc_ValueError, "target_logits: no vocabulary in shape [" +
                                        std::to_string(logits.shape[0]) + ", " +
                                        std::to_string(logits.shape[1]) + "]"};
    }
    const std::vector<int64_t> lengths = read_lengths(counts, num_drafts, out.shape[1]);
    RejectionArgs a{};
    a.logits = logits.data;
    a.bf16 = logits.dtype == DType::kBf16;
    a.logits_stride = logits.strides[0];
    a.vocab = logits.shape[1];
    a.draft_ids = drafts.data;
    a.ids64 = drafts.dtype == DType::kI64;
    a.lengths = lengths.data();
    a.requests = requests;
    read_probs(args[3], args[4], num_drafts, &a);
    read_random(args + 5, num_drafts, &a);
    if (!PyBool_Check(args[10])) {
      throw Error{PyExc_ValueError, "block: expected True or False"};
    }
    a.block = args[10] == Py_True;
    a.token_ids = out.as<int32_t>();
    a.width = out.shape[1];
    a.num_emitted = emitted.as<int32_t>();
    {
      WithoutGil unlocked;
      rejection_sample(active_kernels(), a);
    }
    Py_RETURN_NONE;
  });
}

}  // namespace dspark
