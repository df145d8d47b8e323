#include "vec_scalar.h"
// The vector type must be known before the loops written over it.
#include "kernels.inc.h"

namespace dspark {
const KernelTable* const kScalarTable = &kTable;

const KernelTable* kernel_table(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return kAvx2Table;
    case Isa::kAvx512:
      return kAvx512Table;
    case Isa::kAvx512Bf16:
      return kAvx512Bf16Table;
    case Isa::kAmx:
      return kAmxTable;
    default:
      return kScalarTable;
  }
}
}  // namespace dspark
