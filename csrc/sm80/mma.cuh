// Tensor-core products of one warp, for fragments of 16 query rows against kTokens tokens.
#pragma once
#include "traits.cuh"

namespace fi::sm80 {

constexpr int kStepsQk = kDimQk / 16;

// What a thread holds of one fragment: per 8 columns two of row lane/4 and two of row lane/4 + 8.
template <int kTokens>
using Scores = float[kTokens / 8][4];
template <int kTokens>
using Probabilities = uint32_t[kTokens / 16][4];  // pairs of Element, as the next product wants
using Output = float[kDimVo / 8][4];

template <int kFragments>
struct Queries {
  uint32_t address;  // of this lane's part of the first fragment
  uint32_t kept[kQInRegisters ? kFragments : 1][kQInRegisters ? kStepsQk : 1][4];

  __device__ __forceinline__ Queries(int lane, uint32_t smem_q, int warp_row)
      : address(smem_q + LayoutQk::offset(warp_row + lane % 16, lane / 16)) {}

  __device__ __forceinline__ void read(uint32_t (&a)[4], int fragment, int step) const {
    load_matrix_x4(a, LayoutQk::advance(address, 2 * step) + 16 * fragment * LayoutQk::kRowBytes);
  }
  __device__ __forceinline__ void keep() {
    if constexpr (kQInRegisters) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f)
#pragma unroll
        for (int step = 0; step < kStepsQk; ++step) read(kept[f][step], f, step);
    }
  }
  __device__ __forceinline__ void get(uint32_t (&a)[4], int fragment, int step) const {
    if constexpr (kQInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = kept[fragment][step][i];
    } else {
      read(a, fragment, step);
    }
  }
};

// s = Q K^T of one fragment for tokens [token, token + kTokens) of the tile
template <int kTokens, int kFragments>
__device__ __forceinline__ void scores(int lane, Scores<kTokens>& s, const Queries<kFragments>& q,
                                       int fragment, uint32_t smem_k, int token) {
  lane = forget(lane);
  uint32_t first = smem_k + LayoutQk::offset(token + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = 0.f;
#pragma unroll
  for (int step = 0; step < kStepsQk; ++step) {
    uint32_t a[4];
    q.get(a, fragment, step);
    uint32_t at = LayoutQk::advance(first, 2 * step);
#pragma unroll
    for (int n = 0; n < kTokens / 8; n += 2) {
      uint32_t b[4];
      load_matrix_x4(b, at + 8 * n * LayoutQk::kRowBytes);
      mma_16x8x16<Element>(s[n], a, b[0], b[1]);
      mma_16x8x16<Element>(s[n + 1], a, b[2], b[3]);
    }
  }
}

// o += P V of the first kLive fragments for the same tokens: every V fragment is read once for all of them
template <int kTokens, int kLive, int kFragments>
__device__ __forceinline__ void accumulate(int lane, Output (&o)[kFragments],
                                           const Probabilities<kTokens> (&p)[kFragments], uint32_t smem_v,
                                           int token) {
  lane = forget(lane);
  uint32_t first = smem_v + LayoutVo::offset(token + lane % 16, lane / 16);
#pragma unroll
  for (int step = 0; step < kTokens / 16; ++step) {
#pragma unroll
    for (int n = 0; n < kDimVo / 8; n += 2) {
      uint32_t b[4];
      load_matrix_x4_trans(b, LayoutVo::advance(first, n) + 16 * step * LayoutVo::kRowBytes);
#pragma unroll
      for (int f = 0; f < kLive; ++f) {
        mma_16x8x16<Element>(o[f][n], p[f][step], b[0], b[1]);
        mma_16x8x16<Element>(o[f][n + 1], p[f][step], b[2], b[3]);
      }
    }
  }
}

}  // namespace fi::sm80
