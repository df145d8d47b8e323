// The AVX-512 loops plus a panel product with bfloat16 dot products.
#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512DQ__)
#include "vec_avx512.h"
// The vector type must be known before the loops written over it.
#include "kernels.inc.h"
// These use the table of the loops.
#include "bf16_dot.h"

namespace dspark {
namespace {
constexpr KernelTable kBf16Table = with_bf16_dot();
}

const KernelTable* const kAvx512Bf16Table = &kBf16Table;
}  // namespace dspark
#else
#include "kernels.h"

namespace dspark {
const KernelTable* const kAvx512Bf16Table = nullptr;
}
#endif
