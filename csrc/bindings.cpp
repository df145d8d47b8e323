#include "bindings.h"

#include <exception>

#include "parallel.h"
#include "sequential.h"

#ifndef DSPARK_SOURCE_HASH
#error "build through setup.py, which defines DSPARK_SOURCE_HASH"
#endif

namespace dspark {
namespace {

Isa g_isa = Isa::kScalar;

// set_isa(name): "auto" or an instruction set; refuses what this machine cannot run.
PyObject* py_set_isa(PyObject*, PyObject* arg) {
  return guarded([&]() -> PyObject* {
    const char* name = PyUnicode_AsUTF8(arg);
    if (name == nullptr) return nullptr;
    Isa isa = best_isa();
    if (std::string(name) != "auto" && !parse_isa(name, &isa)) {
      throw Error{PyExc_ValueError, std::string("VLLM_DSPARK_ISA: unknown '") + name +
                                        "' (scalar, avx2, avx512, avx512_bf16, amx)"};
    }
    if (isa > best_isa()) {
      throw Error{PyExc_RuntimeError, std::string("VLLM_DSPARK_ISA: '") + name +
                                          "' is not available here, the best is '" +
                                          isa_name(best_isa()) + "'"};
    }
    g_isa = isa;
    return PyUnicode_FromString(isa_name(isa));
  });
}

PyObject* py_isa(PyObject*, PyObject*) { return PyUnicode_FromString(isa_name(g_isa)); }

// init_omp(path of libtorch_cpu or ""): (file of the OpenMP runtime, how found).
PyObject* py_init_omp(PyObject*, PyObject* arg) {
  const char* path = PyUnicode_AsUTF8(arg);
  if (path == nullptr) return nullptr;
  const OmpRuntime& runtime = init_omp(path);
  return Py_BuildValue("(ss)", runtime.path.c_str(), runtime.origin.c_str());
}

PyObject* py_omp_runtime(PyObject*, PyObject*) {
  const OmpRuntime& runtime = omp_runtime();
  return Py_BuildValue("(ss)", runtime.path.c_str(), runtime.origin.c_str());
}

PyObject* py_max_threads(PyObject*, PyObject*) {
  return PyLong_FromLong(max_threads());
}

PyObject* py_tile_calls(PyObject*, PyObject*) {
  return PyLong_FromLongLong(tile_calls());
}

PyObject* py_source_hash(PyObject*, PyObject*) {
  return PyUnicode_FromString(DSPARK_SOURCE_HASH);
}

template <typename F>
PyCFunction fastcall(F f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef kMethods[] = {
    {"rejection_sample", fastcall(py_rejection_sample), METH_FASTCALL, nullptr},
    {"head_new", fastcall(py_head_new), METH_FASTCALL, nullptr},
    {"draft_sequential", fastcall(py_draft_sequential), METH_FASTCALL, nullptr},
    {"loss_rows", fastcall(py_loss_rows), METH_FASTCALL, nullptr},
    {"set_isa", py_set_isa, METH_O, "Choose the instruction set ('auto': the best)."},
    {"isa", py_isa, METH_NOARGS, "The instruction set in use."},
    {"init_omp", py_init_omp, METH_O, "Find the OpenMP runtime torch uses."},
    {"omp_runtime", py_omp_runtime, METH_NOARGS, "(file, how it was found)"},
    {"max_threads", py_max_threads, METH_NOARGS, "Threads a kernel would use now."},
    {"tile_calls", py_tile_calls, METH_NOARGS, "Products that ran on matrix tiles."},
    {"source_hash", py_source_hash, METH_NOARGS, "Hash of the sources of this build."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT,
                       "_C",
                       "Kernels of vllm_dspark.ops; use them through that package.",
                       -1,
                       kMethods,
                       nullptr,
                       nullptr,
                       nullptr,
                       nullptr};

}  // namespace

const KernelTable& active_kernels() { return *kernel_table(g_isa); }

}  // namespace dspark

PyMODINIT_FUNC PyInit__C() {
  dspark::g_isa = dspark::best_isa();
  return PyModule_Create(&dspark::kModule);
}
