// Structs of int64 fields that travel between Python and C++ as one Shape: the fields in order.
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

}  // namespace fi::core
