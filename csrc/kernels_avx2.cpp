// Compiled with -mavx2 -mfma where the compiler and the processor family know them.
#if defined(__AVX2__) && defined(__FMA__)
#include "vec_avx2.h"
// The vector type must be known before the loops written over it.
#include "kernels.inc.h"

namespace dspark {
const KernelTable* const kAvx2Table = &kTable;
}
#else
#include "kernels.h"

namespace dspark {
const KernelTable* const kAvx2Table = nullptr;
}
#endif
