// The two products of attention for a warpgroup's 64 rows. They are issued here and run on.
#pragma once
#include "softmax.cuh"
#include "wgmma.cuh"

namespace fi::sm90 {

// Shared memory as wgmma reads it. stride: bytes from eight lines to the next eight. leading: from a line's
// columns to the next line's, where columns are the long side of a line (V); otherwise unused.
struct Descriptor {
  static constexpr uint32_t kSwizzle = kLineBytes == 128 ? 1 : 2;
  uint32_t low, high;

  __device__ __forceinline__ Descriptor(uint32_t address, int leading, int stride)
      : low(address >> 4 | uint32_t(leading >> 4) << 16), high(uint32_t(stride >> 4) | kSwizzle << 30) {}
  // bytes further on
  __device__ __forceinline__ uint64_t at(int offset) const {
    return uint64_t(high) << 32 | (low + (offset >> 4));
  }
};

// s = Q K^T, for the first kTokens rows of a K tile at k
template <int kTokens>
__device__ __forceinline__ void issue_scores(Scores<kTokens>& s, uint32_t q, uint32_t k) {
  Descriptor a(q, 0, 8 * kLineBytes), b(k, 0, 8 * kLineBytes);
#pragma unroll
  for (int step = 0; step < kDimQk / 16; ++step) {
    constexpr int kSteps = kLine / 16;
    int line = step / kSteps, within = step % kSteps * 32;  // bytes
    Products<kTokens>::ss(s, a.at(line * kTileQ * kLineBytes + within),
                          b.at(line * kTileKv * kLineBytes + within), step > 0);
  }
}

// o += P V, likewise
template <int kTokens>
__device__ __forceinline__ void issue_outputs(Output& o, const Probabilities<kTokens>& probabilities,
                                              uint32_t v) {
  Descriptor b(v, kTileKv * kLineBytes, 8 * kLineBytes);
#pragma unroll
  for (int step = 0; step < kTokens / 16; ++step)
    Products<kDimVo>::rs(o, probabilities[step], b.at(step * 16 * kLineBytes));
}

}  // namespace fi::sm90
