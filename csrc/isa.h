// Which instruction set the kernels run with, decided once per process.
#pragma once

namespace dspark {

// Ordered: a machine that has one has those before it.
enum class Isa { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
constexpr int kNumIsas = 5;

const char* isa_name(Isa isa);

// Returns false for a name that is none of scalar, avx2, avx512, avx512_bf16, amx.
bool parse_isa(const char* name, Isa* isa);

// The best one this processor and operating system can run and this build has.
Isa best_isa();

}  // namespace dspark
