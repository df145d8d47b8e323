// Tensors as they arrive from Python: DLPack capsules, looked at but never consumed.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace dspark {

// Becomes a Python exception of this type at the binding's edge.
struct Error {
  PyObject* type;
  std::string message;
};

enum class DType { kF32, kF64, kBf16, kI32, kI64, kBool };

constexpr int kMaxDims = 3;

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // elements

  bool defined() const { return data_known; }
  bool data_known = false;  // data may be null for an empty tensor
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

constexpr int64_t kAny = -1;

// What an argument must be. Inner dimension contiguous; all of them if `dense`.
struct Expected {
  const char* name;
  std::initializer_list<DType> dtypes;
  std::initializer_list<int64_t> shape;  // kAny: any size
  bool dense = true;
};

// Raises Error (ValueError naming the shape) if the capsule holds something else.
Tensor require(PyObject* capsule, const Expected& expected);

// The same, but None gives an undefined Tensor.
Tensor optional(PyObject* capsule, const Expected& expected);

}  // namespace dspark
