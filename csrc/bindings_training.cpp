#include <exception>

#include "bindings.h"
#include "loss_rows.h"

namespace dspark {
namespace {

float read_float(PyObject* value) {
  const double x = PyFloat_AsDouble(value);
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw Error{PyExc_TypeError, "loss_rows: alpha and beta are numbers"};
  }
  return static_cast<float>(x);
}

void check_ids(const Tensor& ids, int64_t vocab) {
  const int32_t* x = ids.as<int32_t>();
  for (int64_t i = 0; i < ids.shape[0] * ids.shape[1]; ++i) {
    if (x[i] < -1 || x[i] >= vocab) {
      throw Error{PyExc_ValueError, "ids: " + std::to_string(x[i]) +
                                        " is outside [-1, " + std::to_string(vocab) +
                                        ") given by logits"};
    }
  }
}

}  // namespace

// (logits in and gradient out, ids, probs, weights, alpha, beta, out cross_entropy,
//  out distance)
PyObject* py_loss_rows(PyObject*, PyObject* const* args, Py_ssize_t n) {
  return guarded([&]() -> PyObject* {
    require_count("loss_rows", n, 8);
    const Tensor logits =
        require(args[0], {"logits", {DType::kF32, DType::kBf16}, {kAny, kAny}});
    const int64_t rows = logits.shape[0];
    const Tensor ids = require(args[1], {"ids", {DType::kI32}, {rows, kAny}});
    const Tensor probs =
        require(args[2], {"probs", {DType::kF32}, {rows, ids.shape[1]}});
    const Tensor weights = require(args[3], {"weights", {DType::kF32}, {rows}});
    const Tensor ce = require(args[6], {"cross_entropy", {DType::kF32}, {rows}});
    const Tensor distance = require(args[7], {"distance", {DType::kF32}, {rows}});
    check_ids(ids, logits.shape[1]);
    LossRowsArgs a{};
    a.logits = logits.data;
    a.bf16 = logits.dtype == DType::kBf16;
    a.rows = rows;
    a.vocab = logits.shape[1];
    a.top = ids.shape[1];
    a.ids = ids.as<int32_t>();
    a.probs = probs.as<float>();
    a.weights = weights.as<float>();
    a.alpha = read_float(args[4]);
    a.beta = read_float(args[5]);
    a.cross_entropy = ce.as<float>();
    a.distance = distance.as<float>();
    {
      WithoutGil unlocked;
      loss_rows(active_kernels(), a);
    }
    Py_RETURN_NONE;
  });
}

}  // namespace dspark
