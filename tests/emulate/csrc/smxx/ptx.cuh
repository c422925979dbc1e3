// csrc/smxx/ptx.cuh for the emulator.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace fi::smxx {

inline unsigned char* shared_byte(uint32_t address) { return emulate::block.shared_memory + address; }

inline int fresh_thread_index() { return threadIdx.x; }
inline int forget(int x) { return x; }
inline uint32_t smem_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - shared_byte(0));
}

inline void copy_async_16(uint32_t dst, const void* src, bool valid) {
  emulate::block.self().copies.push_back([=] {
    if (valid) {
      memcpy(shared_byte(dst), src, 16);
    } else {
      memset(shared_byte(dst), 0, 16);
    }
  });
}

template <class Element>
uint32_t pack2(float lo, float hi) {
  return Element(lo).bits | uint32_t(Element(hi).bits) << 16;
}
inline float exp2_approx(float x) { return exp2f(x); }

}  // namespace fi::smxx

inline void* __cvta_shared_to_generic(uint32_t address) { return fi::smxx::shared_byte(address); }
