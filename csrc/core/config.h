// What planner and prefix finder are called with: configurations, structs of int64 fields that travel as one
// Shape, the fields in order; and the lengths of a batch.
#pragma once
#include <tvm/ffi/container/shape.h>

#include <cstring>
#include <stdexcept>

#include "door.h"

namespace fi::core {

using tvm::ffi::Shape;

template <class Struct>
Shape numbers_of(const Struct& fields) {
  static_assert(sizeof(Struct) % sizeof(int64_t) == 0);
  int64_t numbers[sizeof(Struct) / sizeof(int64_t)];
  std::memcpy(numbers, &fields, sizeof fields);
  return Shape(numbers, numbers + sizeof(Struct) / sizeof(int64_t));
}

template <class Struct>
Struct struct_of(const Shape& numbers, const char* what) {
  Struct fields;
  FI_REQUIRE(numbers.size() * sizeof(int64_t) == sizeof fields, ValueError)
      << "expected " << what << " of " << sizeof fields / sizeof(int64_t) << " numbers, got "
      << numbers.size();
  std::memcpy(&fields, numbers.data(), sizeof fields);
  return fields;
}

template <class F>
auto as_value_error(F&& f) {
  try {
    return f();
  } catch (const std::invalid_argument& error) {
    TVM_FFI_THROW(ValueError) << error.what();
  }
  TVM_FFI_UNREACHABLE();
}

inline bool on_host(const TensorView& x) {  // pinned memory may call itself a device of its own
  return x.device().device_type == kDLCPU || x.device().device_type == kDLCUDAHost;
}

// Returns how many requests these are. They must lie where the buffer does.
inline int32_t require_lengths(const TensorView& qo_indptr, const TensorView& kv_len,
                               const TensorView& buffer, int64_t max_requests) {
  auto require_ints = [&buffer](const char* name, const TensorView& x, const char* shape) {
    if (!on_host(x) || !on_host(buffer)) require_device(name, x, buffer.device());
    require_dtype(name, x, DLDataType{kDLInt, 32, 1});
    require_rank(name, x, 1, shape);
    FI_REQUIRE(x.IsContiguous(), ValueError) << "expected " << name << " contiguous";
  };
  require_ints("qo_indptr", qo_indptr, "[requests + 1]");
  require_ints("kv_len", kv_len, "[requests]");
  int64_t requests = kv_len.size(0);
  FI_REQUIRE(qo_indptr.size(0) == requests + 1, ValueError)
      << "expected qo_indptr of " << requests + 1 << " entries (kv_len has " << requests << "), got "
      << qo_indptr.size(0);
  FI_REQUIRE(requests <= max_requests, ValueError)
      << "expected at most " << max_requests << " requests (max_requests), got " << requests;
  return int32_t(requests);
}

}  // namespace fi::core
