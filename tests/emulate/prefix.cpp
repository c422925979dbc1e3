// The device's prefix finder with host threads: fi_find_prefixes as the smxx library exports it, for CPU
// tensors. Beside it the host's, so that both can be built with other hashes.
#include "cuda_on_host.h"

#include <cstring>

#include "core/prefix.cpp"
#include "smxx/prefix.cuh"

static unsigned seed = 0;

extern "C" void set_seed(unsigned value) { seed = value; }

extern "C" int fi_find_prefixes(const fi::FindParams* params, void*) {
  using namespace fi::smxx;
  constexpr int kThreads = 64;
  static HashShared<kThreads> hash_shared;
  static FindShared shared;
  const fi::FindParams& p = *params;
  const int32_t requests = p.batch.num_requests;
  std::vector<int64_t> memory(fi::Trie::bytes(requests) / sizeof(int64_t) + 1);
  auto fill = [](void* x, size_t bytes) { std::memset(x, 0x7f, bytes); };  // shared memory starts as garbage
  try {
    for (int32_t r = 0; requests > 1 && r < requests; ++r) {
      fill(&hash_shared, sizeof hash_shared);
      emulate::block.run(kThreads, seed + r, [&] { hash_request<kThreads>(p, r, hash_shared); });
    }
    for (int32_t i = 0; i < (requests > 0 ? requests : 1); ++i) {
      int32_t r = requests > 0 ? (i + seed) % requests : 0;  // CTAs come in any order
      fill(&shared, sizeof shared), fill(memory.data(), memory.size() * sizeof(int64_t));
      emulate::block.run(kThreads, seed + r, [&] { find_prefixes<kThreads>(p, r, shared, memory.data()); });
    }
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

extern "C" int fi_find_on_host(const fi::FindParams* params, void*) {
  fi::find_prefixes_host(*params);
  return 0;
}

extern "C" const char* fi_error(int) { return "threads wait at different barriers"; }
