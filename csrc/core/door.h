// Checks at the door: small helpers that raise one clear Python exception with the value found and the one
// wanted.
#pragma once
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <string>

#define FI_REQUIRE(condition, Kind) \
  if (!(condition)) TVM_FFI_THROW(Kind)

namespace fi::core {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

inline char* data_of(const TensorView& x) { return static_cast<char*>(x.data_ptr()) + x.byte_offset(); }
inline int element_bytes(const TensorView& x) { return x.dtype().bits * x.dtype().lanes / 8; }

inline std::string shape_text(const TensorView& x) {
  std::string text = "[";
  for (int i = 0; i < x.ndim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + "]";
}

inline std::string dtype_text(DLDataType t) {
  switch (t.code) {
    case kDLBfloat:
      return "bfloat" + std::to_string(t.bits);
    case kDLFloat:
      return "float" + std::to_string(t.bits);
    case kDLInt:
      return "int" + std::to_string(t.bits);
    case kDLUInt:
      return "uint" + std::to_string(t.bits);
    default:
      return "dtype code " + std::to_string(t.code) + " of " + std::to_string(t.bits) + " bits";
  }
}

inline std::string device_text(DLDevice d) {
  return d.device_type == kDLCPU ? "cpu" : "cuda:" + std::to_string(d.device_id);
}

inline bool same(DLDataType a, DLDataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}
inline bool same(DLDevice a, DLDevice b) {
  return a.device_type == b.device_type && (a.device_type == kDLCPU || a.device_id == b.device_id);
}

inline void require_device(const char* name, const TensorView& x, DLDevice wanted) {
  FI_REQUIRE(same(x.device(), wanted), ValueError)
      << "expected " << name << " on " << device_text(wanted) << ", got " << device_text(x.device());
}

inline void require_dtype(const char* name, const TensorView& x, DLDataType wanted) {
  FI_REQUIRE(same(x.dtype(), wanted), TypeError)
      << "expected " << name << " of dtype " << dtype_text(wanted) << ", got " << dtype_text(x.dtype());
}

inline void require_rank(const char* name, const TensorView& x, int rank, const char* shape) {
  FI_REQUIRE(x.ndim() == rank, ValueError)
      << "expected " << name << " " << shape << ", got shape " << shape_text(x);
}

// Rows are read by vector loads: the last dimension is contiguous, and on a GPU every row starts at 16 bytes.
inline void require_rows(const char* name, const TensorView& x, bool aligned) {
  int last = x.ndim() - 1;
  FI_REQUIRE(x.stride(last) == 1 || x.size(last) == 1, ValueError)
      << "expected " << name << " with a contiguous last dimension, got stride " << x.stride(last);
  if (!aligned || x.numel() == 0) return;
  FI_REQUIRE(reinterpret_cast<uintptr_t>(data_of(x)) % 16 == 0, ValueError)
      << "expected " << name << " aligned to 16 bytes, got an address that is "
      << reinterpret_cast<uintptr_t>(data_of(x)) % 16 << " bytes past";
  for (int i = 0; i < last; ++i) {
    FI_REQUIRE(x.size(i) == 1 || x.stride(i) * element_bytes(x) % 16 == 0, ValueError)
        << "expected " << name << " with strides that are multiples of 16 bytes, got stride " << x.stride(i)
        << " elements of " << element_bytes(x) << " bytes in dimension " << i;
  }
}

inline void* stream_of(DLDevice d) {
  return d.device_type == kDLCPU ? nullptr : TVMFFIEnvGetStream(d.device_type, d.device_id);
}

// Calls a function of a kernel library by the address Python's dlopen gave; 0 is success.
template <class Params>
void call_library(int64_t function, int64_t error_text, const Params& params, DLDevice device,
                  const char* what) {
  auto call = reinterpret_cast<int (*)(const Params*, void*)>(function);
  int code = call(&params, stream_of(device));
  FI_REQUIRE(code == 0, RuntimeError) << what << " failed on " << device_text(device) << ": "
                                      << reinterpret_cast<const char* (*)(int)>(error_text)(code);
}

}  // namespace fi::core
