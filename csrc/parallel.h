// Threads, shared with torch: OpenMP's entry points are looked up at run time in the
// runtime that torch has already loaded, never linked, so no second pool can appear.
#pragma once

#include <cstdint>
#include <string>

namespace dspark {

struct OmpRuntime {
  std::string path;    // file of the runtime, or "none"
  std::string origin;  // how it was found
};

// Resolves the runtime; `torch_library` is the path of libtorch_cpu.so or empty.
const OmpRuntime& init_omp(const char* torch_library);

const OmpRuntime& omp_runtime();

int max_threads();

// Runs body(context, thread, team) on every thread of a team and waits. A team of one
// is the calling thread. Must not be nested.
using TeamBody = void (*)(void* context, int thread, int team);
void run_team(TeamBody body, void* context);

// Only inside run_team, by every thread of the team.
void team_barrier(int team);

template <typename F>
void parallel_team(bool parallel, F&& f) {
  if (!parallel || max_threads() == 1) {
    f(0, 1);
    return;
  }
  run_team([](void* c, int thread, int team) { (*static_cast<F*>(c))(thread, team); },
           &f);
}

struct Range {
  int64_t begin, end;
};

// The thread's contiguous share of n items.
inline Range share(int64_t n, int thread, int team) {
  return {n * thread / team, n * (thread + 1) / team};
}

}  // namespace dspark
