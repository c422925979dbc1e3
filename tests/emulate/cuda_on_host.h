// CTAs on the host, one after the other: the threads of one are fibers of one host thread, run in random
// order between barriers.
//
// Warps, named barriers and mbarriers are real, so a kernel that lacks one reads what was not written yet,
// and one that waits for ever says so. Asynchronous copies finish at random times; products read shared
// memory when they are issued or when they are awaited, as the seed has it. Warps shuffle and vote as a
// whole. What is not seen: proxies, registers, memory order, time.
#pragma once
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __noinline__
#define __global__ inline
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

struct int4 {
  int x, y, z, w;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace emulate {

enum class Wait { kNothing, kWarp, kBlock, kUntil, kEnd };

struct Fiber {
  static constexpr size_t kStack = 128 << 10;
  ucontext_t context;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
  Wait wait;
  std::function<bool()> until;
  unsigned shuffles;
  long long lane_value[2];  // a lane cannot be two shuffles ahead of its warp
  std::vector<std::vector<std::function<void()>>> products;  // issued and not awaited, by group
  std::vector<std::function<void()>> copies;                 // cp.async since the last arrival for them
};

// mbarrier: a round is over when all have arrived and no bytes are missing.
struct Barrier {
  int expected = 0, pending = 0, bytes = 0;
  unsigned rounds = 0;
};

struct NamedBarrier {
  int arrived = 0;
  unsigned rounds = 0;
};

struct Block {
  unsigned char* shared_memory = nullptr;  // of a kernel that has dynamic shared memory
  size_t shared_bytes = 0;
  std::unordered_map<uint32_t, Barrier> barriers;  // by address
  NamedBarrier named[16];
  const char* error = nullptr;
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  std::function<void()> body;
  unsigned current = 0;
  bool lazy_products = false;
  std::mt19937 random;
  std::vector<std::function<void()>> in_flight;  // copies that finish at a time of their own

  void pause(Wait wait) {
    Fiber& fiber = fibers[current];
    fiber.wait = wait;
    swapcontext(&fiber.context, &scheduler);
  }
  void pause_until(std::function<bool()> holds) {
    if (holds()) return;
    fibers[current].until = std::move(holds);
    pause(Wait::kUntil);
  }
  static constexpr unsigned kMostTurns = 4;
  void let_others_go() {  // for some turns, or not at all
    unsigned turns = random() % (2 * kMostTurns);
    if (turns < kMostTurns) pause_until([turns]() mutable { return turns-- == 0; });
  }
  Fiber& self() { return fibers[current]; }

  void arrive(uint32_t barrier, int count, int bytes) {
    Barrier& b = barriers[barrier];
    b.pending -= count, b.bytes -= bytes;
    if (b.pending < 0) error = "more arrivals at a barrier than it has";
    if (b.pending == 0 && b.bytes == 0) ++b.rounds, b.pending = b.expected;
  }

  // Lets go of the threads [begin, end) if all of them wait for `wait`.
  bool release(unsigned begin, unsigned end, Wait wait) {
    for (unsigned i = begin; i < end; ++i)
      if (fibers[i].wait != wait) return false;
    for (unsigned i = begin; i < end; ++i) fibers[i].wait = Wait::kNothing;
    return true;
  }

  // Of the copies in flight some, and one at least if `some` is needed.
  bool finish_copies(bool needed) {
    bool any = false;
    for (size_t i = in_flight.size(); i-- > 0;) {
      size_t pick = random() % in_flight.size();
      if (!(needed && !any) && random() % 2) continue;
      auto finish = std::move(in_flight[pick]);
      in_flight.erase(in_flight.begin() + pick);
      finish();
      any = true;
    }
    return any;
  }

  bool can_run(Fiber& fiber) {
    if (fiber.wait == Wait::kUntil && fiber.until()) fiber.wait = Wait::kNothing;
    return fiber.wait == Wait::kNothing;
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
    fiber.context.uc_stack = {fiber.stack.get(), 0, Fiber::kStack};
    fiber.context.uc_link = nullptr;
    fiber.wait = Wait::kNothing;
    fiber.shuffles = 0;
    fiber.products.clear(), fiber.copies.clear();
    makecontext(&fiber.context, enter, 0);
  }
  in_flight.clear(), barriers.clear();
  for (NamedBarrier& barrier : named) barrier = {};
  error = nullptr;
  memset(shared_memory, 0xff, shared_bytes);  // NaN
  random.seed(seed);
  lazy_products = random() % 2;
  std::vector<unsigned> warps(threads / 32);
  for (unsigned i = 0; i < warps.size(); ++i) warps[i] = i;
  for (unsigned idle = 0; !release(0, threads, Wait::kEnd);) {
    bool moved = release(0, threads, Wait::kBlock);
    for (unsigned i = unsigned(warps.size()); i > 1; --i) std::swap(warps[i - 1], warps[random() % i]);
    for (unsigned warp : warps) {  // each as far as the next barrier
      do {
        unsigned first = random() % 32;
        for (unsigned i = 0; i < 32; ++i) {
          current = warp * 32 + (first + i) % 32;
          if (!can_run(fibers[current])) continue;
          moved = true;
          threadIdx.x = current;
          swapcontext(&scheduler, &fibers[current].context);
        }
      } while (release(warp * 32, warp * 32 + 32, Wait::kWarp));
    }
    moved |= finish_copies(!moved);
    if (error) throw std::runtime_error(error);
    idle = moved ? 0 : idle + 1;
    if (idle > kMostTurns) throw std::runtime_error("threads wait for what never comes");
  }
}

// Shows a value to the warp; the function returned reads a lane's.
template <class T>
auto show(T value) {
  static_assert(sizeof(T) <= sizeof(long long));
  Fiber& self = block.fibers[threadIdx.x];
  unsigned warp = threadIdx.x / 32 * 32, turn = self.shuffles++ % 2;
  memcpy(&self.lane_value[turn], &value, sizeof value);
  block.pause(Wait::kWarp);
  return [=](unsigned lane) {
    T shown;
    memcpy(&shown, &block.fibers[warp + lane % 32].lane_value[turn], sizeof shown);
    return shown;
  };
}

}  // namespace emulate

inline void __syncthreads() { emulate::block.pause(emulate::Wait::kBlock); }
inline void __syncwarp() { emulate::block.pause(emulate::Wait::kWarp); }
// width: lanes of a section, a power of two
template <class T>
T __shfl_sync(unsigned, T value, int lane, int width = 32) {
  return emulate::show(value)(threadIdx.x % 32 / width * width + lane % width);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int distance, int width) {
  int lane = threadIdx.x % 32;
  return emulate::show(value)(lane % width + distance < width ? lane + distance : lane);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  int lane = threadIdx.x % 32;
  return emulate::show(value)(lane < distance ? lane : lane - distance);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  int lane = threadIdx.x % 32;
  return emulate::show(value)(lane ^ mask);
}
inline unsigned __ballot_sync(unsigned, int holds) {
  auto of_lane = emulate::show(holds != 0);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= unsigned(of_lane(lane)) << lane;
  return bits;
}
inline bool __any_sync(unsigned all, int holds) { return __ballot_sync(all, holds) != 0; }
inline bool __all_sync(unsigned all, int holds) { return __ballot_sync(all, holds) == ~0u; }
template <class Pick>
int reduce_sync(int value, Pick pick) {
  auto of_lane = emulate::show(value);
  for (unsigned lane = 0; lane < 32; ++lane) value = pick(value, of_lane(lane));
  return value;
}
inline int __reduce_max_sync(unsigned, int value) {
  return reduce_sync(value, [](int a, int b) { return a > b ? a : b; });
}
inline int __reduce_min_sync(unsigned, int value) {
  return reduce_sync(value, [](int a, int b) { return a < b ? a : b; });
}
// one thread runs at a time
inline int atomicMax(int* to, int value) {
  int before = *to;
  if (value > before) *to = value;
  return before;
}
template <class T>
T atomicAdd(T* to, T value) {
  T before = *to;
  *to += value;
  return before;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
