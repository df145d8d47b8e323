#include "tensor_view.h"

#include <cstring>

namespace dspark {
namespace {

// Binary layout of DLPack's DLTensor, the head of every "dltensor" capsule.
struct DlTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

constexpr int32_t kCpu = 1;

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float32";
    case DType::kF64:
      return "float64";
    case DType::kBf16:
      return "bfloat16";
    case DType::kI32:
      return "int32";
    case DType::kI64:
      return "int64";
    case DType::kBool:
      return "bool";
  }
  return "?";
}

bool known_dtype(const DlTensor& t, DType* out) {
  if (t.type_lanes != 1) return false;
  switch (t.type_code << 8 | t.type_bits) {
    case 2 << 8 | 32:
      *out = DType::kF32;
      return true;
    case 2 << 8 | 64:
      *out = DType::kF64;
      return true;
    case 4 << 8 | 16:
      *out = DType::kBf16;
      return true;
    case 0 << 8 | 32:
      *out = DType::kI32;
      return true;
    case 0 << 8 | 64:
      *out = DType::kI64;
      return true;
    case 6 << 8 | 8:
      *out = DType::kBool;
      return true;
  }
  return false;
}

std::string list(const int64_t* begin, size_t n) {
  std::string s = "[";
  for (size_t i = 0; i < n; ++i) {
    if (i) s += ", ";
    s += begin[i] == kAny ? "any" : std::to_string(begin[i]);
  }
  return s + "]";
}

[[noreturn]] void refuse(const Expected& expected, const DlTensor& t,
                         const std::string& got) {
  std::string dtypes;
  for (const DType d : expected.dtypes) {
    dtypes += std::string(dtypes.empty() ? "" : " or ") + dtype_name(d);
  }
  throw Error{PyExc_ValueError,
              std::string(expected.name) + ": expected " + dtypes + " of shape " +
                  list(expected.shape.begin(), expected.shape.size()) +
                  " on the CPU, got " + got + " of shape " + list(t.shape, t.ndim)};
}

// Elements between steps along dimension i; DLPack allows null for contiguous.
int64_t stride(const DlTensor& t, int i) {
  if (t.strides != nullptr) return t.strides[i];
  int64_t s = 1;
  for (int j = i + 1; j < t.ndim; ++j) s *= t.shape[j];
  return s;
}

void check_layout(const Expected& expected, const DlTensor& t) {
  int64_t dense = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    const bool must = expected.dense || i == t.ndim - 1;
    // A dimension of one element has no meaningful stride.
    if (must && t.shape[i] > 1 && stride(t, i) != dense) {
      refuse(expected, t,
             "a non-contiguous tensor (strides " + list(t.strides, t.ndim) + ")");
    }
    if (t.shape[i] > 1 && stride(t, i) < 0) refuse(expected, t, "a negative stride");
    dense *= t.shape[i];
  }
}

}  // namespace

Tensor require(PyObject* capsule, const Expected& expected) {
  const auto* t =
      static_cast<const DlTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  if (t == nullptr) {
    PyErr_Clear();
    throw Error{PyExc_TypeError, std::string(expected.name) + ": not a DLPack capsule"};
  }
  Tensor out;
  if (!known_dtype(*t, &out.dtype)) refuse(expected, *t, "another dtype");
  if (t->device_type != kCpu) refuse(expected, *t, "a tensor on another device");
  bool dtype_ok = false;
  for (const DType d : expected.dtypes) dtype_ok |= d == out.dtype;
  bool shape_ok = t->ndim == static_cast<int>(expected.shape.size());
  for (int i = 0; shape_ok && i < t->ndim; ++i) {
    const int64_t want = expected.shape.begin()[i];
    shape_ok = want == kAny || want == t->shape[i];
  }
  if (!dtype_ok || !shape_ok) refuse(expected, *t, dtype_name(out.dtype));
  check_layout(expected, *t);
  out.data = static_cast<char*>(t->data) + t->byte_offset;
  out.data_known = true;
  out.ndim = t->ndim;
  for (int i = 0; i < t->ndim; ++i) {
    out.shape[i] = t->shape[i];
    out.strides[i] = stride(*t, i);
  }
  return out;
}

Tensor optional(PyObject* capsule, const Expected& expected) {
  return capsule == Py_None ? Tensor{} : require(capsule, expected);
}

}  // namespace dspark
