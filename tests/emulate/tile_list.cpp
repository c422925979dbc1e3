// The device's tile lister with host threads: fi_tile_list for CPU tensors, of the variant in fi_spec.h.
#include "cuda_on_host.h"

#include <cstring>

#include "smxx/tile_list.cuh"

static unsigned seed = 0;

extern "C" void set_seed(unsigned value) { seed = value; }

extern "C" int fi_tile_list(const fi::ListParams* params, void*) {
  constexpr int kThreads = 64;
  static fi::smxx::ListShared<kThreads> shared;
  const auto& args = *reinterpret_cast<const fi::spec::Args*>(params->variant_args);
  for (int32_t line = 0; line < params->plan.list.lines; ++line) {
    std::memset(static_cast<void*>(&shared), 0x7f, sizeof shared);
    try {
      emulate::block.run(kThreads, seed + line, [&] {
        fi::smxx::list_row_tile<fi::spec::Variant>(params->plan, args, line, shared);
      });
    } catch (const std::exception&) {
      return 1;
    }
  }
  return 0;
}

extern "C" const char* fi_error(int) { return "threads wait at different barriers"; }
