// What a kernel of any room takes from its spec: types, head dims, tile shapes.
#pragma once
#include "../tiles.h"
#include "../timer.h"
#include "fi_spec.h"
#include "ptx.cuh"

namespace fi::smxx {

#if defined(FI_ELEMENT_BF16)
using Element = __nv_bfloat16;
#elif defined(FI_ELEMENT_F16)
using Element = __half;
#else
#error "GPUs take bf16 or f16"
#endif

using Args = spec::Args;
using Variant = spec::Variant;
using spec::kBatchInvariant;
using spec::kLevels;
using spec::kProfile;
using spec::kTileList;

constexpr int kDimQk = spec::kHeadDimQk;
constexpr int kDimVo = spec::kHeadDimVo;
static_assert(kDimQk % 16 == 0 && kDimVo % 16 == 0, "head dims are multiples of 16");

constexpr Tiles kTiles = tiles_for(FI_ROOM, FI_ARCH, kDimQk, kDimVo);
constexpr int kTileKv = kTiles.kv;
constexpr int kTileQ = kTiles.q_wide;
constexpr int kChunk = kChunkTiles * kTileKv;  // tokens

}  // namespace fi::smxx
