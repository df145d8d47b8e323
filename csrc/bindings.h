// The Python functions of vllm_dspark._C; each checks every argument before a kernel.
#pragma once

#include "kernels.h"
#include "tensor_view.h"

namespace dspark {

const KernelTable& active_kernels();

PyObject* py_rejection_sample(PyObject* self, PyObject* const* args, Py_ssize_t n);
PyObject* py_head_new(PyObject* self, PyObject* const* args, Py_ssize_t n);
PyObject* py_draft_sequential(PyObject* self, PyObject* const* args, Py_ssize_t n);
PyObject* py_loss_rows(PyObject* self, PyObject* const* args, Py_ssize_t n);

// Runs f, turning Error and C++ exceptions into Python's.
template <typename F>
PyObject* guarded(F&& f) {
  try {
    return f();
  } catch (const Error& e) {
    PyErr_SetString(e.type, e.message.c_str());
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
  return nullptr;
}

inline void require_count(const char* function, Py_ssize_t got, Py_ssize_t want) {
  if (got == want) return;
  throw Error{PyExc_TypeError, std::string(function) + ": expected " +
                                   std::to_string(want) + " arguments, got " +
                                   std::to_string(got)};
}

// Lets other Python threads run; nothing inside may touch Python.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace dspark
