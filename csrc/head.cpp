#include "head.h"

namespace dspark {
namespace {

// Element (v, k) of W2; `group` consecutive k of a row lie side by side.
template <typename T>
void pack_tiles(const T* w2, int64_t rows, int64_t rank, int64_t padded_rank,
                int64_t padded_rows, int64_t group, LineVector<T>* out) {
  out->assign(static_cast<size_t>(padded_rows * padded_rank), T{0});
  for (int64_t v = 0; v < rows; ++v) {
    T* tile = out->data() + (v / kTile) * padded_rank * kTile + (v % kTile) * group;
    for (int64_t k = 0; k < rank; ++k) {
      tile[(k / group) * group * kTile + k % group] = w2[v * rank + k];
    }
  }
}

}  // namespace

void Head::pack() {
  std::call_once(packed, [this] {
    const int64_t padded_rows = panels() * kPanel;
    if (bf16) {
      pack_tiles(static_cast<const uint16_t*>(w2), draft_vocab, rank, padded_rank(),
                 padded_rows, 2, &packed_bf16);
    } else {
      pack_tiles(static_cast<const float*>(w2), draft_vocab, rank, padded_rank(),
                 padded_rows, 1, &packed_f32);
    }
  });
}

}  // namespace dspark
