#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "bindings.h"
#include "sequential.h"

namespace dspark {
namespace {

constexpr const char* kHeadCapsule = "vllm_dspark.SequentialHead";

// The weights and the capsules that keep their tensors alive.
struct OwnedHead {
  Head head;
  std::vector<PyObject*> capsules;
};

void destroy(PyObject* capsule) {
  auto* owned = static_cast<OwnedHead*>(PyCapsule_GetPointer(capsule, kHeadCapsule));
  for (PyObject* c : owned->capsules) Py_DECREF(c);
  delete owned;
}

HeadType parse_type(PyObject* name) {
  const char* s = PyUnicode_AsUTF8(name);
  const std::string type = s ? s : "";
  if (type == "none") return HeadType::kNone;
  if (type == "vanilla") return HeadType::kVanilla;
  if (type == "gated") return HeadType::kGated;
  if (type == "rnn") return HeadType::kRnn;
  PyErr_Clear();
  throw Error{PyExc_ValueError, "head_type: unknown '" + type + "'"};
}

// Every id the map can produce must have a row in w1.
void check_map(const Head& head) {
  for (int64_t v = 0; v < head.draft_vocab && head.vocab; ++v) {
    const int64_t id = head.draft_to_target ? head.draft_to_target[v] : v;
    if (id < 0 || id >= head.vocab) {
      throw Error{PyExc_ValueError, "draft_to_target[" + std::to_string(v) +
                                        "] = " + std::to_string(id) +
                                        " has no row in markov_w1 of shape [" +
                                        std::to_string(head.vocab) + ", " +
                                        std::to_string(head.rank) + "]"};
    }
  }
}

// args: w1, w2, joint_weight, joint_bias
void read_markov(PyObject* const* args, Head* head) {
  if (head->type == HeadType::kNone && args[0] == Py_None) return;
  const Tensor w1 =
      require(args[0], {"markov_w1", {DType::kF32, DType::kBf16}, {kAny, kAny}});
  const DType dtype = w1.dtype;
  head->bf16 = dtype == DType::kBf16;
  head->vocab = w1.shape[0];
  head->rank = w1.shape[1];
  head->w1 = w1.data;
  if (head->type == HeadType::kNone) return;
  head->w2 =
      require(args[1], {"markov_w2", {dtype}, {head->draft_vocab, head->rank}}).data;
  if (head->type == HeadType::kVanilla) return;
  const bool rnn = head->type == HeadType::kRnn;
  const int64_t out = rnn ? 3 * head->rank : head->rank;
  const int64_t in = head->hidden + (rnn ? 2 : 1) * head->rank;
  head->joint_weight = require(args[2], {"joint_weight", {dtype}, {out, in}}).data;
  head->joint_bias = require(args[3], {"joint_bias", {dtype}, {out}}).data;
}

void read_confidence(PyObject* weight, PyObject* bias, Head* head) {
  const Tensor w = optional(weight, {"confidence_weight", {DType::kF32}, {kAny}});
  if (!w.defined()) return;
  head->confidence_weight = w.as<float>();
  head->confidence_markov = w.shape[0] != head->hidden;
  if (head->confidence_markov) {
    const int64_t want = head->hidden + head->rank;
    if (head->w1 == nullptr || w.shape[0] != want) {
      throw Error{PyExc_ValueError,
                  "confidence_weight: expected shape [" + std::to_string(head->hidden) +
                      "] or, with markov_w1, [" + std::to_string(want) +
                      "], got shape [" + std::to_string(w.shape[0]) + "]"};
    }
  }
  const Tensor b = optional(bias, {"confidence_bias", {DType::kF32}, {1}});
  head->confidence_bias = b.as<float>();
}

int64_t read_size(PyObject* number, const char* name) {
  const long long value = PyLong_AsLongLong(number);
  if (PyErr_Occurred() || value < 0 || value > INT32_MAX) {
    PyErr_Clear();
    throw Error{PyExc_ValueError, std::string(name) + " is out of range"};
  }
  return value;
}

void check_anchors(const Head& head, const Tensor& anchors) {
  for (int64_t r = 0; head.w1 && r < anchors.shape[0]; ++r) {
    const int64_t id = anchors.as<int64_t>()[r];
    if (id < 0 || id >= head.vocab) {
      throw Error{PyExc_ValueError, "anchor_ids[" + std::to_string(r) +
                                        "] = " + std::to_string(id) +
                                        " has no row in markov_w1 of shape [" +
                                        std::to_string(head.vocab) + ", " +
                                        std::to_string(head.rank) + "]"};
    }
  }
}

void set_tensor(const Tensor& t, const void** data, bool* bf16, int64_t* strides) {
  *data = t.data;
  *bf16 = t.dtype == DType::kBf16;
  strides[0] = t.strides[0];
  strides[1] = t.strides[1];
}

// args: temperature, uniforms
void read_random(PyObject* const* args, DraftArgs* a) {
  const Tensor t = optional(args[0], {"temperature", {DType::kF32}, {a->requests}});
  const Tensor u =
      optional(args[1], {"uniforms", {DType::kF64}, {a->requests, a->positions}});
  a->temperature = t.as<float>();
  a->uniforms = u.as<double>();
  for (int64_t r = 0; t.defined() && !u.defined() && r < a->requests; ++r) {
    if (!(a->temperature[r] >= 1e-5f)) continue;
    throw Error{PyExc_ValueError, "uniforms of shape [" + std::to_string(a->requests) +
                                      ", " + std::to_string(a->positions) +
                                      "] are needed: request " + std::to_string(r) +
                                      " is not greedy"};
  }
}

// args: out token_ids, probs, support, confidence, certainty, finite
void read_outputs(PyObject* const* args, const Head& head, DraftArgs* a) {
  const int64_t r = a->requests, k = a->positions;
  const int64_t width = a->topk ? a->topk : head.draft_vocab;
  a->token_ids = require(args[0], {"token_ids", {DType::kI64}, {r, k}}).as<int64_t>();
  a->probs = optional(args[1], {"probs", {DType::kF32}, {r, k, width}}).as<float>();
  a->support =
      optional(args[2], {"support", {DType::kI32}, {r, k, width}}).as<int32_t>();
  a->confidence = optional(args[3], {"confidence", {DType::kF32}, {r, k}}).as<float>();
  a->certainty = optional(args[4], {"certainty", {DType::kF32}, {r, k}}).as<float>();
  a->finite = require(args[5], {"finite", {DType::kBool}, {r}}).as<bool>();
}

}  // namespace

// (head_type, draft_vocab, hidden, w1, w2, joint_weight, joint_bias,
//  confidence_weight, confidence_bias, draft_to_target)
PyObject* py_head_new(PyObject*, PyObject* const* args, Py_ssize_t n) {
  return guarded([&]() -> PyObject* {
    require_count("head_new", n, 10);
    auto owned = std::make_unique<OwnedHead>();
    Head& head = owned->head;
    head.type = parse_type(args[0]);
    head.draft_vocab = read_size(args[1], "draft_vocab");
    head.hidden = read_size(args[2], "hidden");
    read_markov(args + 3, &head);
    read_confidence(args[7], args[8], &head);
    head.draft_to_target =
        optional(args[9], {"draft_to_target", {DType::kI32}, {head.draft_vocab}})
            .as<int32_t>();
    check_map(head);
    PyObject* capsule = PyCapsule_New(owned.get(), kHeadCapsule, destroy);
    if (capsule == nullptr) return nullptr;
    for (int i = 3; i < 10; ++i) {
      Py_INCREF(args[i]);
      owned->capsules.push_back(args[i]);
    }
    owned.release();
    return capsule;
  });
}

// (head, base_logits, hidden, anchor_ids, temperature, uniforms, topk,
//  out token_ids, out probs, out support, out confidence, out certainty, out finite)
PyObject* py_draft_sequential(PyObject*, PyObject* const* args, Py_ssize_t n) {
  return guarded([&]() -> PyObject* {
    require_count("draft_sequential", n, 13);
    auto* owned = static_cast<OwnedHead*>(PyCapsule_GetPointer(args[0], kHeadCapsule));
    if (owned == nullptr) return nullptr;
    Head& head = owned->head;
    const Tensor base = require(args[1], {"base_logits",
                                          {DType::kF32, DType::kBf16},
                                          {kAny, kAny, head.draft_vocab},
                                          false});
    DraftArgs a{};
    a.requests = base.shape[0];
    a.positions = base.shape[1];
    set_tensor(base, &a.base, &a.base_bf16, a.base_strides);
    const Tensor hidden = require(args[2], {"hidden",
                                            {DType::kF32, DType::kBf16},
                                            {a.requests, a.positions, head.hidden},
                                            false});
    set_tensor(hidden, &a.hidden, &a.hidden_bf16, a.hidden_strides);
    const Tensor anchors =
        require(args[3], {"anchor_ids", {DType::kI64}, {a.requests}});
    check_anchors(head, anchors);
    a.anchors = anchors.as<int64_t>();
    read_random(args + 4, &a);
    a.topk = read_size(args[6], "topk");
    if (a.topk > head.draft_vocab) {
      throw Error{PyExc_ValueError, "topk exceeds the draft vocabulary"};
    }
    read_outputs(args + 7, head, &a);
    if ((a.confidence != nullptr) && head.confidence_weight == nullptr) {
      throw Error{PyExc_ValueError, "confidence: the head has no confidence_weight"};
    }
    if (a.requests > 0 && a.positions > 0) {
      WithoutGil unlocked;
      draft_sequential(active_kernels(), head, a);
    }
    Py_RETURN_NONE;
  });
}

}  // namespace dspark
