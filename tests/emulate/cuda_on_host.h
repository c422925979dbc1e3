// One CTA on the host: its threads are fibers of one host thread, run in random order between barriers.
//
// Warps and the block have real barriers, so a kernel that lacks one reads what was not written yet. Only
// what the planner needs: one block, shuffles by whole warps.
#pragma once
#include <ucontext.h>

#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#define __device__
#define __forceinline__ inline

struct ThreadIndex {
  unsigned x;
};
inline ThreadIndex threadIdx;

struct int4 {
  int x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

namespace emulate {

enum class Wait { kNothing, kWarp, kBlock, kEnd };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(32 << 10);
  Wait wait;
  unsigned shuffles;
  long long lane_value[2];  // a lane cannot be two shuffles ahead of its warp
};

struct Block {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  std::function<void()> body;
  unsigned current = 0;

  void pause(Wait wait) {
    Fiber& fiber = fibers[current];
    fiber.wait = wait;
    swapcontext(&fiber.context, &scheduler);
  }

  // Lets go of the threads [begin, end) if all of them wait for `wait`.
  bool release(unsigned begin, unsigned end, Wait wait) {
    for (unsigned i = begin; i < end; ++i)
      if (fibers[i].wait != wait) return false;
    for (unsigned i = begin; i < end; ++i) fibers[i].wait = Wait::kNothing;
    return true;
  }

  void run(unsigned threads, unsigned seed, std::function<void()> kernel);
};

inline Block block;

inline void enter() {
  block.body();
  block.pause(Wait::kEnd);
}

inline void Block::run(unsigned threads, unsigned seed, std::function<void()> kernel) {
  body = std::move(kernel);
  if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, 32 << 10};
    fiber.context.uc_link = nullptr;
    fiber.wait = Wait::kNothing;
    fiber.shuffles = 0;
    makecontext(&fiber.context, enter, 0);
  }
  std::mt19937 random(seed);
  std::vector<unsigned> warps(threads / 32);
  for (unsigned i = 0; i < warps.size(); ++i) warps[i] = i;
  while (!release(0, threads, Wait::kEnd)) {
    bool moved = release(0, threads, Wait::kBlock);
    for (unsigned i = unsigned(warps.size()); i > 1; --i) std::swap(warps[i - 1], warps[random() % i]);
    for (unsigned warp : warps) {  // each as far as the block's next barrier
      do {
        unsigned first = random() % 32;
        for (unsigned i = 0; i < 32; ++i) {
          current = warp * 32 + (first + i) % 32;
          if (fibers[current].wait != Wait::kNothing) continue;
          moved = true;
          threadIdx.x = current;
          swapcontext(&scheduler, &fibers[current].context);
        }
      } while (release(warp * 32, warp * 32 + 32, Wait::kWarp));
    }
    if (!moved) throw std::runtime_error("threads wait at different barriers");
  }
}

// Shows a value to the warp; the function returned reads a lane's.
inline auto show(long long value) {
  Fiber& self = block.fibers[threadIdx.x];
  unsigned warp = threadIdx.x / 32 * 32, turn = self.shuffles++ % 2;
  self.lane_value[turn] = value;
  block.pause(Wait::kWarp);
  return [=](unsigned lane) { return block.fibers[warp + lane].lane_value[turn]; };
}

}  // namespace emulate

inline void __syncthreads() { emulate::block.pause(emulate::Wait::kBlock); }
inline long long __shfl_sync(unsigned, long long value, int lane) { return emulate::show(value)(lane); }
inline long long __shfl_up_sync(unsigned, long long value, int distance) {
  int lane = threadIdx.x % 32;
  return emulate::show(value)(lane < distance ? lane : lane - distance);
}
inline long long __shfl_xor_sync(unsigned, long long value, int mask) {
  int lane = threadIdx.x % 32;
  return emulate::show(value)(lane ^ mask);
}
inline unsigned __ballot_sync(unsigned, int holds) {
  auto of_lane = emulate::show(holds != 0);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= unsigned(of_lane(lane)) << lane;
  return bits;
}
// one thread runs at a time
inline unsigned long long atomicMax(unsigned long long* to, unsigned long long value) {
  unsigned long long before = *to;
  if (value > before) *to = value;
  return before;
}
inline int atomicAdd(int* to, int value) {
  int before = *to;
  *to += value;
  return before;
}
inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }
