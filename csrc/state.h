// Joining partial states: the one arithmetic of every merge, host and device. All in log2.
#pragma once
#include "variant.h"

#if !defined(__CUDACC__)
#include <cmath>
#endif

namespace fi {

// Running softmax denominator: weight(i) = exp2(logit_i - max), sum = sum of weights. Empty: max = -inf, sum
// = 0. A joined value is  joined(o, factors, o_new),  and at the end  o * finish().
struct State {
  float max, sum;

  struct Factors {
    float keep, take;
  };

  FI_HD static State empty() { return {-INFINITY, 0.f}; }
  // What a piece has come to. Without softmax pieces add up, and nothing divides them.
  template <class Variant>
  FI_HD static State of(float max, float sum) {
    return Variant::kSoftmax ? State{max, sum} : State{0.f, 1.f};
  }

  // Adds mass 2^log2_mass * amount. -inf joins nothing, also to an empty state (inf - inf would be NaN).
  FI_HD Factors join(float log2_mass, float amount = 1.f) {
    if (log2_mass == -INFINITY) return {1.f, 0.f};
    float top = max > log2_mass ? max : log2_mass;
    Factors f{exp2f(max - top), exp2f(log2_mass - top)};
    sum = fmaf(sum, f.keep, amount * f.take);  // said, not left to the compiler: the same bits everywhere
    max = top;
    return f;
  }

  FI_HD static float joined(float o, const Factors& f, float o_new) {
    return fmaf(f.take, o_new, o * f.keep);
  }

  // The last step of a row: its sink, at most one, joins here and nowhere else.
  template <class Variant, class Args>
  FI_HD float finish(const Args& args, int32_t q_head) {
    if constexpr (!Variant::kSoftmax) return 1.f;
    float keep = 1.f;
    if constexpr (Variant::kHasSink) keep = join(Variant::sink(args, q_head) * kLog2e).keep;
    return keep * inverse();
  }

  FI_HD float inverse() const {
#if defined(__CUDA_ARCH__)
    return sum > 0.f ? __fdividef(1.f, sum) : 0.f;  // the exact division is a call, and a call spills
#else
    return sum > 0.f ? 1.f / sum : 0.f;
#endif
  }
  FI_HD float lse() const { return sum > 0.f ? max + log2f(sum) : -INFINITY; }  // log2
};

// The first of an item's rows of partial states, see WorkItem::slot; negative: it writes the output.
FI_HD int32_t first_state(const AttentionParams& p, int32_t slot) {
  return slot < -1 ? -2 - slot : slot * p.partial_rows;
}

// Batch invariant: the state that a piece of work joins its chunks to. The slot's if its row tile was split,
// otherwise the worker's own.
FI_HD int64_t state_of_piece(const AttentionParams& p, int32_t slot, int32_t worker, int32_t tile_q) {
  return slot >= 0 ? int64_t(slot) * p.partial_rows : p.worker_state + int64_t(worker) * tile_q;
}

}  // namespace fi
