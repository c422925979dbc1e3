// The device planner's own text with host threads: fi_plan as the smxx library exports it, for CPU tensors.
#include "cuda_on_host.h"

#include <cstring>

#include "smxx/plan.cuh"

static unsigned seed = 0;

extern "C" void set_seed(unsigned value) { seed = value; }

extern "C" int fi_plan(const fi::PlanParams* params, void*) {
  constexpr int kThreads = 1024;
  static fi::smxx::PlanShared<kThreads> shared;
  std::memset(static_cast<void*>(&shared), 0x7f, sizeof shared);  // shared memory starts as garbage
  try {
    emulate::block.run(kThreads, seed, [params] { fi::smxx::plan_block<kThreads>(*params, shared); });
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

extern "C" const char* fi_error(int) { return "threads wait at different barriers"; }
