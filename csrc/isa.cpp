#include "isa.h"

#include <cstring>

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dspark {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};

// Matrix tiles: the processor has them, the system saves them (XCR0), and it lets this
// process use them. The permission is for the process and what it forks; asking again
// is harmless. Refused, for example, by a kernel before 5.16 or a sandbox.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16Bit = 1u << 22, kTileBit = 1u << 24, kOsxsaveBit = 1u << 27;
  constexpr unsigned kTileState = (1u << 17) | (1u << 18);
  constexpr long kArchReqXcompPerm = 0x1023, kXtileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kOsxsaveBit) == 0) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & kBf16Bit) == 0 || (d & kTileBit) == 0) return false;
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kTileState) != kTileState) return false;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
#else
  return false;
#endif
}

bool cpu_has(Isa isa) {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the system saves the registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return bf16;
    case Isa::kAmx: {
      static const bool tiles = may_use_tiles();
      return bf16 && tiles;
    }
  }
  return false;
#else
  return isa == Isa::kScalar;
#endif
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool parse_isa(const char* name, Isa* isa) {
  for (int i = 0; i < kNumIsas; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      *isa = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

Isa best_isa() {
  for (int i = kNumIsas - 1; i > 0; --i) {
    const Isa isa = static_cast<Isa>(i);
    if (cpu_has(isa) && kernel_table(isa) != nullptr) return isa;
  }
  return Isa::kScalar;
}

}  // namespace dspark
