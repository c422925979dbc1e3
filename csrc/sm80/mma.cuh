// Tensor-core products of one warp: 16 query rows against kTokens tokens.
#pragma once
#include "traits.cuh"

namespace fi::sm80 {

constexpr int kStepsQk = kDimQk / 16;

struct QueryFragment {
  uint32_t a[kQInRegisters ? kStepsQk : 1][4];

  __device__ __forceinline__ static void load_step(uint32_t (&r)[4], uint32_t smem_q, int row, int step) {
    int lane = threadIdx.x % 32;
    load_matrix_x4(r, smem_q + LayoutQk::offset(row + lane % 16, 2 * step + lane / 16));
  }
  __device__ __forceinline__ void load(uint32_t smem_q, int row) {
    if constexpr (kQInRegisters) {
#pragma unroll
      for (int s = 0; s < kStepsQk; ++s) load_step(a[s], smem_q, row, s);
    }
  }
};

// s[n] = Q K^T for tokens [token, token + kTokens) of the tile
template <int kTokens>
__device__ __forceinline__ void scores(float (&s)[kTokens / 8][4], const QueryFragment& q, uint32_t smem_q, int row,
                                       uint32_t smem_k, int token) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = 0.f;
#pragma unroll
  for (int step = 0; step < kStepsQk; ++step) {
    uint32_t a[4];
    if constexpr (kQInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = q.a[step][i];
    } else {
      QueryFragment::load_step(a, smem_q, row, step);
    }
#pragma unroll
    for (int n = 0; n < kTokens / 8; n += 2) {
      uint32_t b[4];
      load_matrix_x4(b, smem_k + LayoutQk::offset(token + 8 * n + lane % 8 + lane / 16 * 8,
                                                  2 * step + lane / 8 % 2));
      mma_16x8x16<Element>(s[n], a, b[0], b[1]);
      mma_16x8x16<Element>(s[n + 1], a, b[2], b[3]);
    }
  }
}

// o += P V for the same tokens; P is rounded to Element
template <int kTokens>
__device__ __forceinline__ void accumulate(float (&o)[kDimVo / 8][4], const float (&p)[kTokens / 8][4],
                                           uint32_t smem_v, int token) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kTokens / 16; ++step) {
    uint32_t a[4] = {pack2<Element>(p[2 * step][0], p[2 * step][1]), pack2<Element>(p[2 * step][2], p[2 * step][3]),
                     pack2<Element>(p[2 * step + 1][0], p[2 * step + 1][1]),
                     pack2<Element>(p[2 * step + 1][2], p[2 * step + 1][3])};
#pragma unroll
    for (int n = 0; n < kDimVo / 8; n += 2) {
      uint32_t b[4];
      load_matrix_x4_trans(b, smem_v + LayoutVo::offset(token + 16 * step + lane % 16, n + lane / 16));
      mma_16x8x16<Element>(o[n], a, b[0], b[1]);
      mma_16x8x16<Element>(o[n + 1], a, b[2], b[3]);
    }
  }
}

}  // namespace fi::sm80
