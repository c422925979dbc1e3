// Products of a warpgroup: 64 rows, k = 16, fp32 sums in registers. B, and A where it is in shared memory,
// are named by descriptors (mma.cuh).
#pragma once
#include "traits.cuh"

namespace fi::sm90 {

// Before the first product that reads registers which others wrote.
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until at most kPending groups are in flight. The registers are named, or the compiler would read them
// before.
template <int kPending, int kRegisters>
__device__ __forceinline__ void products_wait(float (&d)[kRegisters]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// What computes x, which is finite, comes before the next wait: the compiler would rather wait first.
// address: where a float could be stored.
__device__ __forceinline__ void before_next_wait(float x, uint32_t address) {
  asm volatile(
      "{\n"
      ".reg .pred never;\n"
      "setp.eq.f32 never, %0, 0f7f800000;\n"
      "@never st.shared.f32 [%1], %0;\n"
      "}\n" ::"f"(x),
      "r"(address)
      : "memory");
}

#if defined(FI_ELEMENT_BF16)
#define FI_TYPES ".f32.bf16.bf16 "
#else
#define FI_TYPES ".f32.f16.f16 "
#endif
#define FI_D8(i)                                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FI_D32(i) FI_D8(i), FI_D8(i + 8), FI_D8(i + 16), FI_D8(i + 24)
#define FI_D_16 FI_D8(0), FI_D8(8)
#define FI_LIST_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FI_D_24 FI_D_16, FI_D8(16)
#define FI_LIST_24 FI_LIST_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FI_D_32 FI_D32(0)
#define FI_LIST_32 FI_LIST_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FI_D_40 FI_D_32, FI_D8(32)
#define FI_LIST_40 FI_LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FI_D_48 FI_D_40, FI_D8(40)
#define FI_LIST_48 FI_LIST_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FI_D_56 FI_D_48, FI_D8(48)
#define FI_LIST_56 FI_LIST_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FI_D_64 FI_D32(0), FI_D32(32)
#define FI_LIST_64 FI_LIST_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FI_D_80 FI_D_64, FI_D8(64), FI_D8(72)
#define FI_LIST_80 \
  FI_LIST_64       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define FI_D_96 FI_D_64, FI_D32(64)
#define FI_LIST_96 \
  FI_LIST_80       \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FI_D_128 FI_D_96, FI_D32(96)
#define FI_LIST_128                                                                                      \
  FI_LIST_96                                                                                             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
  "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

template <int kColumns>
struct Products;

// ss: d = a b (+ d), a and b rows of whole lines. rs: a in registers, b transposed: its lines are columns.
#define FI_PRODUCTS(COLUMNS, REGISTERS, A0, A1, A2, A3, A4)                                                  \
  template <>                                                                                                \
  struct Products<COLUMNS> {                                                                                 \
    __device__ __forceinline__ static void ss(float (&d)[REGISTERS], uint64_t a, uint64_t b, int add) {      \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" A2                                               \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16" FI_TYPES "{" FI_LIST_##REGISTERS \
                   "}, %" A0 ", %" A1 ", add, 1, 1, 0, 0;\n}\n"                                              \
                   : FI_D_##REGISTERS                                                                        \
                   : "l"(a), "l"(b), "r"(add));                                                              \
    }                                                                                                        \
    __device__ __forceinline__ static void rs(float (&d)[REGISTERS], const uint32_t (&a)[4], uint64_t b) {   \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16" FI_TYPES "{" FI_LIST_##REGISTERS       \
                   "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" A4 ", 1, 1, 1, 1;\n"                         \
                   : FI_D_##REGISTERS                                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                    \
    }                                                                                                        \
  };
FI_PRODUCTS(32, 16, "16", "17", "18", "19", "20")
FI_PRODUCTS(48, 24, "24", "25", "26", "27", "28")
FI_PRODUCTS(64, 32, "32", "33", "34", "35", "36")
FI_PRODUCTS(80, 40, "40", "41", "42", "43", "44")
FI_PRODUCTS(96, 48, "48", "49", "50", "51", "52")
FI_PRODUCTS(112, 56, "56", "57", "58", "59", "60")
FI_PRODUCTS(128, 64, "64", "65", "66", "67", "68")
FI_PRODUCTS(160, 80, "80", "81", "82", "83", "84")
FI_PRODUCTS(192, 96, "96", "97", "98", "99", "100")
FI_PRODUCTS(256, 128, "128", "129", "130", "131", "132")
#undef FI_PRODUCTS

}  // namespace fi::sm90
