// The sm90 room as it is, door and merge included, over the headers of this folder.
#include "include/cuda_bf16.h"  // as nvcc, before everything

#include "sm90/attention.cu"

namespace fi::sm90 {
alignas(1024) unsigned char shared[kSmemBytes];
static bool known =
    (emulate::block.shared_memory = shared, emulate::block.shared_bytes = sizeof shared, true);
}  // namespace fi::sm90

extern "C" void set_seed(unsigned value) { emulate::seed = value; }
