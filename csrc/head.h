// Weights of the sequential head as the kernels want them (paper section 3.1).
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#include "kernels.h"

namespace dspark {

enum class HeadType { kNone, kVanilla, kGated, kRnn };

// Memory in whole cache lines: a row of a matrix tile that crosses one loads twice.
template <typename T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  LineAllocator() = default;
  template <typename U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), kLine));
  }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};
template <typename T>
using LineVector = std::vector<T, LineAllocator<T>>;

struct Head {
  HeadType type = HeadType::kNone;
  bool bf16 = false;  // type of w1, w2 and the joint layer
  int64_t vocab = 0;  // rows of w1, 0 without
  int64_t draft_vocab = 0;
  int64_t rank = 0;
  int64_t hidden = 0;
  const void* w1 = nullptr;            // [vocab, rank]
  const void* w2 = nullptr;            // [draft_vocab, rank]
  const void* joint_weight = nullptr;  // gated [rank, hidden + rank]; rnn [3 rank, ...]
  const void* joint_bias = nullptr;    // gated [rank]; rnn [3 rank]
  const float* confidence_weight = nullptr;  // [hidden] or [hidden + rank]
  const float* confidence_bias = nullptr;    // [1]
  bool confidence_markov = false;
  const int32_t* draft_to_target = nullptr;  // [draft_vocab] or null: identity

  // W2 in tiles of 16 rows, [tile][k][16], pairs of k interleaved for bfloat16 and
  // padded with zeros to whole panels and, for bfloat16, to whole matrix tiles. Made on
  // first use, since drafting from candidates (topk) reads rows of w2 itself.
  LineVector<float> packed_f32;
  LineVector<uint16_t> packed_bf16;
  std::once_flag packed;

  int64_t padded_rank() const {
    const int64_t unit = bf16 ? kRankUnit : 2;
    return (rank + unit - 1) / unit * unit;
  }
  int64_t panels() const { return (draft_vocab + kPanel - 1) / kPanel; }
  void pack();
  const float* packed_data(const float*) const { return packed_f32.data(); }
  const uint16_t* packed_data(const uint16_t*) const { return packed_bf16.data(); }
};

}  // namespace dspark
