// Compile-time shape of the sm90 kernel for the spec at hand.
#pragma once
#include "../smxx/spec.cuh"

namespace fi::sm90 {

using namespace smxx;

// One warpgroup of 128 threads loads, two compute.
constexpr int kGroupThreads = 128;
constexpr int kConsumers = 2;
constexpr int kThreads = kGroupThreads * (1 + kConsumers);
constexpr int kConsumerWarps = 4 * kConsumers;
constexpr int kKvThreads = 96;  // of the producer's; its last warp loads queries
constexpr int kRunTokens = 16;  // of a box of tokens that lie one behind the other
// of a tile, those that a warp gathers, if there are as many left
constexpr int kWarpTokens = (kTileKv / (kKvThreads / 32) + kRunTokens - 1) / kRunTokens * kRunTokens;
constexpr int kGroupRows = 64;  // of a wgmma
static_assert(kTileQ == kConsumers * kGroupRows && kTiles.q_narrow == kGroupRows, "rows of a warpgroup");

// setmaxnreg divides what the launch was given, kLaunchRegisters a thread; more than that is awaited for
// ever.
constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
constexpr int kProducerRegisters = 88, kConsumerRegisters = 208;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * kLaunchRegisters);

// A tile in shared memory: blocks of as many columns as a line holds, the last perhaps not full; in a block
// each row is one swizzled line. That is what TMA writes and wgmma reads. TMA reads whole lines: short ones
// where rows would end within a long one.
constexpr int kLineBytes = kDimQk % 64 == 0 && kDimVo % 64 == 0 ? 128 : 64;
constexpr int kLine = kLineBytes / 2, kLineChunks = kLineBytes / 16;  // elements, chunks of 16 bytes
constexpr int kLinesQk = (kDimQk + kLine - 1) / kLine, kLinesVo = (kDimVo + kLine - 1) / kLine;
static_assert(kDimVo <= kDimQk, "the rule in fi_backend/jit");

template <int kRows>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  int swizzled = chunk % kLineChunks ^ row / (128 / kLineBytes) % kLineChunks;
  return chunk / kLineChunks * (kRows * kLineBytes) + row * kLineBytes + (swizzled << 4);
}

constexpr int kQBytes = kTileQ * kLinesQk * kLineBytes;
constexpr int kKBytes = kTileKv * kLinesQk * kLineBytes;
constexpr int kVBytes = kTileKv * kLinesVo * kLineBytes;

constexpr int kBlockSmem = 227 * 1024;
constexpr int kControlBytes = 1024;  // Control in smem.cuh
constexpr int kTasks = 2;  // items known at a time: the next one's keys are loaded while this one lasts
constexpr int kQStages = kDimQk <= 128 ? 2 : 1;
constexpr int kRoom = kBlockSmem - kControlBytes - kQStages * kQBytes;
constexpr int kVSlots = kRoom / (kKBytes + kVBytes);
constexpr int kKSlots = kVSlots + (kRoom - kVSlots * (kKBytes + kVBytes) >= kKBytes ? 1 : 0);
static_assert(kVSlots >= 2, "one is read while the other is filled");
constexpr int kRingBytes = kKSlots * kKBytes + kVSlots * kVBytes;
constexpr int kSmemBytes = kRingBytes + kQStages * kQBytes + kControlBytes;
// narrow tiles: one warpgroup hands its sums to the other through Q's place
static_assert(kGroupRows * kDimVo * 4 <= kQBytes, "exchange");

}  // namespace fi::sm90
