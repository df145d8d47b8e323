#include "parallel.h"

#include <dlfcn.h>

#include <type_traits>

namespace dspark {
namespace {

struct Entry {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  void (*barrier)() = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
};

Entry g_entry;
OmpRuntime g_runtime{"none", "not initialised"};

template <typename F>
bool load(void* handle, const char* name, F* out) {
  *out = reinterpret_cast<F>(dlsym(handle, name));
  return *out != nullptr;
}

bool resolve(void* handle, const char* origin) {
  Entry e;
  if (!load(handle, "GOMP_parallel", &e.parallel) ||
      !load(handle, "GOMP_barrier", &e.barrier) ||
      !load(handle, "omp_get_thread_num", &e.thread_num) ||
      !load(handle, "omp_get_num_threads", &e.num_threads) ||
      !load(handle, "omp_get_max_threads", &e.max_threads) ||
      !load(handle, "omp_in_parallel", &e.in_parallel)) {
    return false;
  }
  Dl_info info;
  const bool known = dladdr(reinterpret_cast<void*>(e.parallel), &info) != 0;
  g_entry = e;
  g_runtime = {known && info.dli_fname ? info.dli_fname : "unknown", origin};
  return true;
}

struct Trampoline {
  TeamBody body;
  void* context;
};

void trampoline(void* data) {
  const auto* t = static_cast<Trampoline*>(data);
  t->body(t->context, g_entry.thread_num(), g_entry.num_threads());
}

}  // namespace

const OmpRuntime& init_omp(const char* torch_library) {
  // The global scope first, for it is what torch's own calls bind to when a runtime is
  // preloaded (LD_PRELOAD=libiomp5.so); then torch's dependencies, whatever their name.
  if (resolve(RTLD_DEFAULT, "process")) return g_runtime;
  if (torch_library != nullptr && torch_library[0] != '\0') {
    void* torch = dlopen(torch_library, RTLD_LAZY | RTLD_NOLOAD);
    if (torch != nullptr && resolve(torch, "torch")) return g_runtime;
  }
  // A torch without OpenMP has no pool to collide with.
  void* gomp = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (gomp != nullptr && resolve(gomp, "system")) return g_runtime;
  g_runtime = {"none", "no OpenMP runtime found: one thread"};
  return g_runtime;
}

const OmpRuntime& omp_runtime() { return g_runtime; }

int max_threads() {
  if (g_entry.max_threads == nullptr || g_entry.in_parallel()) return 1;
  return g_entry.max_threads();
}

void run_team(TeamBody body, void* context) {
  if (max_threads() == 1) {
    body(context, 0, 1);
    return;
  }
  // Zero asks for the full team: a smaller one would make the runtime end threads that
  // torch's next region has to start again.
  Trampoline t{body, context};
  g_entry.parallel(trampoline, &t, 0, 0);
}

void team_barrier(int team) {
  if (team > 1) g_entry.barrier();
}

}  // namespace dspark
