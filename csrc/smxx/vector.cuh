// Query, key and value transforms of vectors that lie in shared memory, in place. A few lanes share a vector:
// each has eight elements of its first half and eight of its second, where rotation finds their partners.
#pragma once
#include "spec.cuh"

namespace fi::smxx {

__device__ __forceinline__ Element* element_at(uint32_t shared) {
  return static_cast<Element*>(__cvta_shared_to_generic(shared));
}

template <int kElements>
struct Lanes {
  static constexpr int kHalf = kElements / 2, kUsed = kElements / 16;
  static constexpr int kCount = kUsed <= 1 ? 1 : kUsed <= 2 ? 2 : kUsed <= 4 ? 4 : kUsed <= 8 ? 8 : 16;
  static constexpr int kVectors = 32 / kCount;  // of a warp at a time
};

// At(chunk) is where 8 elements lie.
template <int kElements, class At>
struct Vector {
  using Group = Lanes<kElements>;
  static constexpr int kDim = kElements;
  At at;
  int first;  // of the lane's elements in the first half
  float own[2][8];

  __device__ Vector(At at_, int lane) : at(at_), first(lane % Group::kCount * 8), own{} {
    if (idle()) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 chunk = *reinterpret_cast<const uint4*>(chunk_of(half));
      const auto* elements = reinterpret_cast<const Element*>(&chunk);
#pragma unroll
      for (int i = 0; i < 8; ++i) own[half][i] = float(elements[i]);
    }
  }

  __device__ __forceinline__ bool idle() const {
    return Group::kUsed < Group::kCount && first >= Group::kHalf;
  }
  __device__ __forceinline__ Element* chunk_of(int half) const {
    return at((first + half * Group::kHalf) / 8);
  }
  __device__ __forceinline__ Dim dim(int half, int i) const { return {first, half * Group::kHalf + i}; }

  // Of the lane's own it is a register, once steps are constants.
  __device__ __forceinline__ float operator[](Dim d) const {
    if (d.step >= 0 && d.step < 8) return own[0][d.step];
    if (d.step >= Group::kHalf && d.step < Group::kHalf + 8) return own[1][d.step - Group::kHalf];
    return float(at(d / 8)[d % 8]);
  }

  template <class F>
  __device__ __forceinline__ float sum(F f) const {
    float total = 0.f;
    if (!idle()) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 8; ++i) total += f(dim(half, i));
    }
#pragma unroll
    for (int mask = 1; mask < Group::kCount; mask *= 2) total += __shfl_xor_sync(~0u, total, mask);
    return total;
  }
};

// All lanes of a warp, each for its vector, of which those that share one say the same. exists: write it.
template <int kElements, class At, class Transform>
__device__ __forceinline__ void transform_vector(int lane, At at, bool exists, Transform transform) {
  using V = Vector<kElements, At>;
  const V x(at, lane);
  auto changed = transform(x);
  uint4 chunks[2] = {};
  if (!x.idle()) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      auto pair = [&](int i) { return pack2<Element>(changed[x.dim(half, i)], changed[x.dim(half, i + 1)]); };
      chunks[half] = {pair(0), pair(2), pair(4), pair(6)};
    }
  }
  __syncwarp();  // all have read what they want of the old one
  if (!exists || x.idle()) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) *reinterpret_cast<uint4*>(x.chunk_of(half)) = chunks[half];
}

// Tokens of a KV tile that are keys of the task, by warp `warp` of `warps`. At(row, chunk).
template <bool kOfV, class TaskOfItem, class At>
__device__ __forceinline__ void transform_tokens(const Args& args, const TaskOfItem& task, int tile_token,
                                                 int warp, int warps, int lane, At at) {
  constexpr int kElements = kOfV ? kDimVo : kDimQk;
  using Group = Lanes<kElements>;
#pragma unroll 1
  for (int first = warp * Group::kVectors; first < kTileKv; first += warps * Group::kVectors) {
    const int row = first + lane / Group::kCount, token = tile_token + row;
    const bool exists = token >= task.key_begin && token < task.key_end;
    // what a transform reads by position must exist
    const Key key{task.request, task.kv_head, max(task.key_begin, min(token, task.key_end - 1)), task.kv_len};
    transform_vector<kElements>(
        lane, [&](int chunk) { return at(row, chunk); }, exists,
        [&](const auto& x) {
          if constexpr (kOfV) {
            return Variant::value(args, x, key);
          } else {
            return Variant::key(args, x, key);
          }
        });
  }
}

// The first `rows` of a tile of queries. Those past the task's end repeat its last one.
template <class TaskOfItem, class At>
__device__ __forceinline__ void transform_queries(const AttentionParams& p, const Args& args,
                                                  const TaskOfItem& task, int rows, int warp, int warps,
                                                  int lane, At at) {
  using Group = Lanes<kDimQk>;
#pragma unroll 1
  for (int first = warp * Group::kVectors; first < rows; first += warps * Group::kVectors) {
    const int index = first + lane / Group::kCount;
    const Row row = task.row(p, task.begin + index);
    transform_vector<kDimQk>(
        lane, [&](int chunk) { return at(index, chunk); }, index < rows,
        [&](const auto& x) { return Variant::query(args, x, row); });
  }
}

}  // namespace fi::smxx
