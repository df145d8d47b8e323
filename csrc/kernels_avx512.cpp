// Compiled with the AVX-512 flags where the compiler and the processor know them.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include "vec_avx512.h"
// The vector type must be known before the loops written over it.
#include "kernels.inc.h"

namespace dspark {
const KernelTable* const kAvx512Table = &kTable;
}
#else
#include "kernels.h"

namespace dspark {
const KernelTable* const kAvx512Table = nullptr;
}
#endif
