// csrc/sm90/ptx.cuh for the emulator.
#pragma once
#include <cuda.h>

#include "../smxx/ptx.cuh"

namespace fi::sm90 {

using emulate::block;
using smxx::shared_byte;

inline void barrier_init(uint32_t barrier, int arrivals) { block.barriers[barrier] = {arrivals, arrivals}; }
inline int uniform(int x) { return __shfl_sync(~0u, x, 0); }
inline int lane_now() { return threadIdx.x % 32; }
inline void fence_barrier_init() {}
inline void barrier_arrive(uint32_t barrier, int count = 1) {
  block.arrive(barrier, count, 0);
  block.let_others_go();
}
inline void barrier_expect(uint32_t barrier, int bytes) { block.barriers[barrier].bytes += bytes; }
inline void barrier_arrive_copies(uint32_t barrier) {
  block.in_flight.push_back([barrier, copies = std::move(block.self().copies)] {
    for (auto& copy : copies) copy();
    block.arrive(barrier, 1, 0);
  });
  block.self().copies.clear();
}
inline void wait_copies() {
  for (auto& copy : block.self().copies) copy();
  block.self().copies.clear();
}
inline void barrier_wait(uint32_t barrier, int parity) {
  block.pause_until([=] { return int(block.barriers[barrier].rounds & 1) != parity; });
}
inline void fence_async_proxy() {}

// Where swizzle puts a byte, in lines of 64 or 128 bytes.
inline uint32_t swizzled(uint32_t address, int line_bytes) {
  return address ^ (address >> 7 & (line_bytes / 16 - 1)) << 4;
}

inline void copy_box(uint32_t dst, const CUtensorMap* map, uint32_t barrier, int x, int y, int z, int w) {
  block.in_flight.push_back([=] {
    const int at[4] = {x, y, z, w};
    uint32_t to = dst;
    for (uint32_t l = 0; l < map->box[3]; ++l)
      for (uint32_t k = 0; k < map->box[2]; ++k)
        for (uint32_t j = 0; j < map->box[1]; ++j)
          for (uint32_t i = 0; i < map->box[0]; ++i, to += 2) {
            const uint32_t in_box[4] = {i, j, k, l};
            const char* from = map->base;
            bool inside = true;
            for (int d = 0; d < 4; ++d) {
              int64_t coordinate = int64_t(at[d]) + in_box[d];
              inside &= coordinate >= 0 && coordinate < int64_t(map->sizes[d]);
              from += coordinate * int64_t(map->strides[d]);
            }
            uint16_t value = 0;
            if (inside) memcpy(&value, from, 2);
            memcpy(shared_byte(swizzled(to, map->swizzle)), &value, 2);
          }
    block.arrive(barrier, 0, int(to - dst));
  });
}

inline void prefetch_map(const CUtensorMap*) {}
inline void prefetch(const void*) {}
inline void let_next_kernel_launch() {}
inline void wait_for_kernel_before() {}
inline void named_arrive(int id, int threads) {
  emulate::NamedBarrier& barrier = block.named[id];
  if (++barrier.arrived == threads) barrier.arrived = 0, ++barrier.rounds;
}
inline void named_sync(int id, int threads) {
  unsigned round = block.named[id].rounds;
  named_arrive(id, threads);
  block.pause_until([=] { return block.named[id].rounds != round; });
}
template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

}  // namespace fi::sm90
