// What of CUDA's driver API the rooms use, for the emulator: tensor maps as plain data.
#pragma once
#include <stdint.h>

typedef uint64_t cuuint64_t;
typedef uint32_t cuuint32_t;
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_64B = 64, CU_TENSOR_MAP_SWIZZLE_128B = 128 };  // bytes
enum CUtensorMapL2promotion {
  CU_TENSOR_MAP_L2_PROMOTION_NONE,
  CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
  CU_TENSOR_MAP_L2_PROMOTION_L2_256B
};
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct CUtensorMap {  // of four dimensions, two bytes an element
  const char* base;
  cuuint64_t sizes[4], strides[4];  // bytes
  cuuint32_t box[4];
  int swizzle;  // bytes
};

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base,
                                       const cuuint64_t* sizes, const cuuint64_t* strides,
                                       const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  bool fits = rank == 4 && uintptr_t(base) % 16 == 0 && box[0] * 2 <= cuuint32_t(swizzle);
  map->base = static_cast<const char*>(base);
  map->swizzle = swizzle;
  for (int i = 0; i < 4; ++i) {
    map->sizes[i] = sizes[i], map->strides[i] = i ? strides[i - 1] : 2, map->box[i] = box[i];
    fits &= sizes[i] > 0 && sizes[i] <= cuuint64_t(1) << 32 && box[i] > 0 && box[i] <= 256 && steps[i] == 1;
    fits &= i == 0 || (strides[i - 1] % 16 == 0 && strides[i - 1] < cuuint64_t(1) << 40);
  }
  return fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
