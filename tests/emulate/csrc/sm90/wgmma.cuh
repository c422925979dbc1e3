// csrc/sm90/wgmma.cuh for the emulator: every thread computes its own part of a product. Shared memory is
// read when the product is issued, or when it is awaited.
#pragma once
#include "traits.cuh"

namespace fi::sm90 {

inline void products_fence() {}
inline auto& open_groups() {  // of the thread; the last is not committed yet
  auto& groups = block.self().products;
  if (groups.empty()) groups.emplace_back();
  return groups;
}
inline void products_commit() { open_groups().emplace_back(); }

template <int kPending, int kRegisters>
void products_wait(float (&)[kRegisters]) {
  block.let_others_go();
  auto& groups = open_groups();
  while (groups.size() > kPending + 1) {
    for (auto& product : groups.front()) product();
    groups.erase(groups.begin());
  }
  __syncwarp();  // the instruction is the warp's
}
inline void before_next_wait(float, uint32_t) {}

// What a descriptor names.
struct Matrix {
  uint32_t start, leading, stride;
  int line_bytes;

  explicit Matrix(uint64_t d)
      : start((d & 0x3fff) << 4),
        leading((d >> 16 & 0x3fff) << 4),
        stride((d >> 32 & 0x3fff) << 4),
        line_bytes(d >> 62 == 1 ? 128 : 64) {}

  float by_rows(int row, int column) const {  // a line is a row
    uint32_t address = start + row / 8 * stride + row % 8 * line_bytes + column * 2;
    __nv_bfloat16 x;
    memcpy(&x, shared_byte(swizzled(address, line_bytes)), 2);
    return float(x);
  }
  float by_columns(int row, int column) const {  // a line is some columns of a row
    Matrix further = *this;
    further.start += column / (line_bytes / 2) * leading;
    return further.by_rows(row, column % (line_bytes / 2));
  }
};

inline void issue(std::function<void()> product) {
  if (block.lazy_products) {
    open_groups().back().push_back(std::move(product));
  } else {
    product();
  }
}

template <int kColumns>
struct Products {
  using Sums = float[kColumns / 2];

  // add(row, column) for every element that the thread holds
  template <class Add>
  static void each(Sums& d, int lane, Add add) {
    for (int n = 0; n < kColumns / 8; ++n)
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) d[4 * n + 2 * i + j] += add(i, 8 * n + lane % 4 * 2 + j);
  }

  static void ss(Sums& d, uint64_t a, uint64_t b, int accumulate) {
    int lane = threadIdx.x % 32, first = threadIdx.x % 128 / 32 * 16 + lane / 4;
    issue([=, &d, a = Matrix(a), b = Matrix(b)] {
      if (!accumulate) memset(d, 0, sizeof d);
      each(d, lane, [=](int i, int column) {
        float sum = 0.f;
        for (int k = 0; k < 16; ++k) sum += a.by_rows(first + 8 * i, k) * b.by_rows(column, k);
        return sum;
      });
    });
  }

  static void rs(Sums& d, const uint32_t (&a)[4], uint64_t b) {
    int lane = threadIdx.x % 32;
    std::vector<float> rows(32);
    for (int half = 0; half < 2; ++half) {  // of the 16 columns of A; a lane's quad has them
      auto shown = emulate::show(uint64_t(a[2 * half]) | uint64_t(a[2 * half + 1]) << 32);
      for (int k = 0; k < 8; ++k)
        for (int i = 0; i < 2; ++i) {
          uint32_t pair = uint32_t(shown(lane / 4 * 4 + k / 2) >> 32 * i);
          rows[16 * i + 8 * half + k] = __int_as_float(int(k % 2 ? pair & 0xffff0000 : pair << 16));
        }
    }
    issue([=, &d, b = Matrix(b)] {
      each(d, lane, [&](int i, int column) {
        float sum = 0.f;
        for (int k = 0; k < 16; ++k) sum += rows[16 * i + k] * b.by_columns(k, column);
        return sum;
      });
    });
  }
};

}  // namespace fi::sm90
