// Compile-time shape of the sm80 kernel for the spec at hand.
#pragma once
#include "../smxx/spec.cuh"
#include "ptx.cuh"

namespace fi::sm80 {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kWideFragments = kTileQ / (16 * kWarps);  // 16-row fragments a warp has of a wide tile
static_assert(kTiles.q_narrow == 16 && kTileQ == 16 * kWarps * kWideFragments && kTileKv == 16 * kWarps,
              "warp layout");

// A tile in shared memory: rows of kDim elements in 16-byte chunks. Rows of whole 128-byte lines are
// swizzled, others padded by one chunk; either way eight consecutive rows of one chunk column hit different
// banks.
template <int kDim>
struct TileLayout {
  static constexpr bool kSwizzled = kDim % 64 == 0;
  static constexpr int kChunks = kDim / 8;
  static constexpr int kRowBytes = 2 * kDim + (kSwizzled ? 0 : 16);
  __device__ __forceinline__ static uint32_t offset(int row, int chunk) {
    return row * kRowBytes + ((kSwizzled ? chunk ^ (row & 7) : chunk) << 4);
  }
  // From offset(row, c) to offset(row, c + step) for even c < 2 and even step. Volatile, or the compiler
  // keeps the address of every step of an unrolled loop in a register of its own, and spills.
  __device__ __forceinline__ static uint32_t advance(uint32_t address, int step) {
    if constexpr (!kSwizzled) return address + (step << 4);
    uint32_t moved;
    asm volatile("xor.b32 %0, %1, %2;" : "=r"(moved) : "r"(address), "r"((step & 7) << 4));
    return moved + ((step & ~7) << 4);
  }
};
using LayoutQk = TileLayout<kDimQk>;
using LayoutVo = TileLayout<kDimVo>;

constexpr int kQBytes = kTileQ * LayoutQk::kRowBytes;
constexpr int kSlotBytes =
    kTileKv * (LayoutQk::kRowBytes > LayoutVo::kRowBytes ? LayoutQk::kRowBytes : LayoutVo::kRowBytes);

constexpr int kBlockSmem = FI_ARCH >= 90                    ? 227 * 1024
                           : FI_ARCH == 80 || FI_ARCH == 87 ? 163 * 1024
                                                            : 99 * 1024;
constexpr int kPlaceBytes = 2 * kTileKv * 8 + 128;  // TokenPlaces of two tiles, Task, cursor
constexpr int kFixedBytes = kQBytes + kPlaceBytes;
constexpr int kRoom = kBlockSmem / kTiles.ctas_per_sm - 1024 - kFixedBytes;  // 1 KiB a CTA is the system's
constexpr int kSlots = kRoom / kSlotBytes >= 4 ? 4 : kRoom / kSlotBytes >= 3 ? 3 : 2;
static_assert(kSlots >= 2 && kSlots <= 4, "the prologue of the ring");
constexpr int kDataBytes = kQBytes + kSlots * kSlotBytes;
constexpr int kSmemBytes = kDataBytes + kPlaceBytes;
static_assert(kSmemBytes <= kBlockSmem, "shared memory");
static_assert(kWarps * 16 * (kDimVo + 2) * 4 <= kDataBytes, "warp states are exchanged in shared memory");

constexpr bool kQInRegisters = kDimQk <= 64;

}  // namespace fi::sm80
