// What attention computes: small functors, compiled by the host compiler and nvcc alike.
//
// A functor is a struct with static members; it inherits Feature and overrides what it changes.
// Args is the generated struct of named arguments (fi_spec.h). All logits are in natural units, already
// scaled. Compose<F...> joins features: key ranges intersect, a key must be seen by all, logits transforms
// apply left to right, at most one sink or function of weights.
//
// mask(), logits() and weights() read what a row needs and return an object that is asked for each key: what
// is looked up there, executors look up before they wait for the logits. It holds values, not the row's
// address. Executors pass logits as Logit and positions as Position; an object may take float and int32_t
// instead.
#pragma once
#include <type_traits>

#include "vector.h"

#if !defined(__CUDACC__)
#include <cmath>
#endif

namespace fi {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct Row {        // one query row
  int32_t request;  // index in the batch
  int32_t q_head;
  int32_t q_pos;    // position of the row's token among the request's keys: kv_len - q_len + token
  int32_t kv_len;   // the request's keys
  int32_t q_len;    // its query tokens
  int32_t q_token;  // index of the row's token in q
};

// Of query token `token` of q.
FI_HD Row row_of_token(const Batch& batch, int32_t request, int32_t q_head, int32_t token) {
  const int32_t first = batch.qo_indptr[request], q_len = batch.qo_indptr[request + 1] - first;
  const int32_t kv_len = batch.kv_len[request];
  return {request, q_head, kv_len - q_len + token - first, kv_len, q_len, token};
}

struct Key {  // one key, or value
  int32_t request, kv_head;
  int32_t kv_pos;  // among the request's keys
  int32_t kv_len;
};

struct KeyRange {  // keys [begin, end); both must not decrease with q_pos
  int32_t begin, end;
};

// Operators of the four types below are for a second operand of just that type; with any other, the first
// becomes a number.
template <class T, class Exactly, class Result>
using For = std::enable_if_t<std::is_same_v<T, Exactly>, Result>;

// raw * scale + shift, not computed yet: a factor joins both, and the sum is one fused product.
struct ShiftedLogit {
  float raw, scale, shift;

  FI_HD operator float() const { return raw * scale + shift; }
  template <class T>
  friend FI_HD For<T, float, ShiftedLogit> operator*(ShiftedLogit x, T y) {
    return {x.raw, x.scale * y, x.shift * y};
  }
  template <class T>
  friend FI_HD For<T, float, ShiftedLogit> operator*(T y, ShiftedLogit x) {
    return x * y;
  }
};

// raw * scale, not multiplied yet either.
struct Logit {
  float raw, scale;

  FI_HD operator float() const { return raw * scale; }
  template <class T>
  friend FI_HD For<T, float, Logit> operator*(Logit x, T y) {
    return {x.raw, x.scale * y};
  }
  template <class T>
  friend FI_HD For<T, float, Logit> operator*(T y, Logit x) {
    return x * y;
  }
  template <class T>
  friend FI_HD For<T, float, ShiftedLogit> operator+(Logit x, T y) {
    return {x.raw, x.scale, y};
  }
  template <class T>
  friend FI_HD For<T, float, ShiftedLogit> operator+(T y, Logit x) {
    return x + y;
  }
  template <class T>
  friend FI_HD For<T, float, ShiftedLogit> operator-(Logit x, T y) {
    return x + -y;
  }
};

// first + step as a float; of the keys of a tile, steps are known when compiled, and `first` is one.
struct Distance {
  float first, step;

  FI_HD operator float() const { return first + step; }
  template <class T>
  friend FI_HD For<T, float, float> operator*(T y, Distance d) {
    return y * d.step + y * d.first;
  }
  template <class T>
  friend FI_HD For<T, float, float> operator*(Distance d, T y) {
    return y * d;
  }
};

// first + step, of a key.
struct Position {
  int32_t first, step;

  FI_HD operator int32_t() const { return first + step; }
  FI_HD Distance distance() const { return {float(first), float(step)}; }
  template <class T>
  friend FI_HD For<T, int32_t, Position> operator-(Position p, T x) {
    return {p.first - x, p.step};
  }
  template <class T>
  friend FI_HD For<T, int32_t, Position> operator-(T x, Position p) {
    return {x - p.first, -p.step};
  }
};

struct SeesAll {
  FI_HD bool sees(int32_t) const { return true; }
};
struct Unchanged {
  template <class X>
  FI_HD X operator()(X x, Position) const {
    return x;
  }
};

struct Feature {
  static constexpr bool kHasQuery = false;
  static constexpr bool kHasKey = false;
  static constexpr bool kHasValue = false;
  static constexpr bool kHasOutput = false;
  static constexpr bool kHasLogits = false;
  static constexpr bool kHasSink = false;
  static constexpr bool kSoftmax = true;  // false: weights() says what a key weighs
  // Every row sees all keys before its own position: rows of a shared prefix then need not be asked.
  static constexpr bool kWholePast = false;
  template <class A>
  FI_HD static KeyRange keys(const A&, const Row& r) {
    return {0, r.kv_len};
  }
  // Within the range mask() hides single keys, none before seen_before(): there executors need not ask. A
  // hidden key's logit becomes -inf after the logits transforms: a soft cap would make it finite again.
  template <class A>
  FI_HD static int32_t seen_before(const A&, const Row&) {
    return INT32_MAX;
  }
  template <class A>
  FI_HD static SeesAll mask(const A&, const Row&) {
    return {};
  }
  template <class A>
  FI_HD static Unchanged logits(const A&, const Row&) {
    return {};
  }
  template <class A>
  FI_HD static float sink(const A&, int32_t) {
    return 0.f;
  }
  // Of the vector x of a head: mapped(x, [=](Dim d) { return ...; }), see vector.h. On a GPU the result is
  // rounded to the type of q and of the cache.
  template <class A, class X>
  FI_HD static X query(const A&, X x, const Row&) {
    return x;
  }
  template <class A, class X>
  FI_HD static X key(const A&, X x, const Key&) {
    return x;
  }
  template <class A, class X>
  FI_HD static X value(const A&, X x, const Key&) {
    return x;
  }
  // of element d of a finished row, also of one without keys, which is 0
  template <class A>
  FI_HD static float output(const A&, float x, const Row&, int32_t) {
    return x;
  }
  // of the logit x, after all logits transforms; a hidden key weighs 0
  template <class A>
  FI_HD static Unchanged weights(const A&, const Row&) {
    return {};
  }
};

struct Causal : Feature {
  static constexpr bool kWholePast = true;
  template <class A>
  FI_HD static KeyRange keys(const A&, const Row& r) {
    return {0, r.q_pos + 1};
  }
};

// keys (q_pos - window, q_pos + ...]; the upper end is Causal's business
struct Window : Feature {
  template <class A>
  FI_HD static KeyRange keys(const A& a, const Row& r) {
    return {r.q_pos - a.window + 1, r.kv_len};
  }
};

// Speculative token trees: the last tree_tokens keys of a request are its tree. A query token among them has
// a word, bit j of which says whether it sees the j-th of them; one before them sees all.
struct Tree : Feature {
  struct Word {
    uint64_t word;
    int32_t first;

    FI_HD bool sees(int32_t kv_pos) const {
      uint32_t j = kv_pos - first;  // keys before the tree wrap around
      return j >= 64 || (word >> j & 1);
    }
  };
  template <class A>
  FI_HD static int32_t seen_before(const A& a, const Row& r) {
    return r.kv_len - a.tree_tokens;
  }
  template <class A>
  FI_HD static Word mask(const A& a, const Row& r) {
    int32_t first = seen_before(a, r), token = r.q_pos - first;
    return {token < 0 ? ~0ull : a.tree_mask[int64_t(r.request) * a.tree_tokens + token], first};
  }
};

// Documents packed into a request: a query token sees the keys of its own.
struct Document : Feature {
  template <class Ids>
  struct Same {
    Ids ids;
    int32_t own;

    FI_HD bool sees(int32_t kv_pos) const { return ids[kv_pos] == own; }
  };
  template <class A>
  FI_HD static int32_t seen_before(const A&, const Row&) {
    return 0;
  }
  template <class A>
  FI_HD static auto mask(const A& a, const Row& r) {
    auto ids = a.document_ids[r];
    return Same<decltype(ids)>{ids, ids[r.q_pos]};
  }
};

// A prefix that all tokens see, causal after it.
struct PrefixLm : Feature {
  template <class A>
  FI_HD static KeyRange keys(const A& a, const Row& r) {
    int32_t prefix = a.prefix_len[r.request];
    return {0, prefix > r.q_pos ? prefix : r.q_pos + 1};
  }
};

// A bit for each pair of query token and key. Executors ask for whole tiles of keys, and bits past the keys
// are another token's, or nobody's.
struct PackedMask : Feature {
  template <class Bytes>
  struct Bits {
    Bytes bytes;
    int64_t first;  // byte of the row's first bit
    uint32_t shift;
    int32_t kv_len;

    FI_HD bool sees(int32_t kv_pos) const {
      uint32_t bit = shift + kv_pos;
      return kv_pos < kv_len && (bytes[first + (bit >> 3)] >> (bit & 7) & 1);
    }
  };
  template <class A>
  FI_HD static int32_t seen_before(const A&, const Row&) {
    return 0;
  }
  template <class A>
  FI_HD static auto mask(const A& a, const Row& r) {
    auto bytes = a.packed_mask;
    int64_t bit = int64_t(r.q_pos - r.kv_len + r.q_len) * r.kv_len;
    return Bits<decltype(bytes)>{bytes, a.mask_indptr[r.request] + (bit >> 3), uint32_t(bit & 7), r.kv_len};
  }
};

#if defined(__CUDA_ARCH__)
FI_HD float exp2_on_gpu(float x) {  // at the ends 0 or inf
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FI_HD float inverse_on_gpu(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// cap * tanh(x / cap). On a GPU without the branches of tanhf, which would cost the kernel its registers; the
// error stays below 1e-6 cap.
struct Capped {
  float cap;

  FI_HD explicit Capped(float c) : cap(c) {}
  template <class X>
  FI_HD float operator()(X x, Position) const {
#if defined(__CUDA_ARCH__)
    float e = exp2_on_gpu(x * __fdividef(2.f * kLog2e, cap));  // tanh(y) = 1 - 2 / (1 + exp(2y))
    return (1.f - 2.f * inverse_on_gpu(1.f + e)) * cap;        // not cap - 2 cap inverse: a register more
#else
    return cap * tanhf(x / cap);
#endif
  }
};

struct SoftCap : Feature {
  static constexpr bool kWholePast = true;
  static constexpr bool kHasLogits = true;
  template <class A>
  FI_HD static Capped logits(const A& a, const Row&) {
    return Capped(a.soft_cap);
  }
};

struct Alibi : Feature {
  static constexpr bool kWholePast = true;
  struct Bias {
    float slope;
    int32_t q_pos;

    template <class X>
    FI_HD float operator()(X x, Position kv_pos) const {
      return x + slope * (kv_pos - q_pos).distance();
    }
  };
  static constexpr bool kHasLogits = true;
  template <class A>
  FI_HD static Bias logits(const A& a, const Row& r) {
    return Bias{a.alibi_slopes[r.q_head], r.q_pos};
  }
};

// One extra logit per head that takes part in the softmax and carries no value. LSE counts it.
struct Sinks : Feature {
  static constexpr bool kWholePast = true;
  static constexpr bool kHasSink = true;
  template <class A>
  FI_HD static float sink(const A& a, int32_t q_head) {
    return a.sinks[q_head];
  }
};

// 1 / (1 + exp(-x - bias)). Not by tanh.approx, whose error of 2^-12 is more than the small weights
// themselves.
template <class X>
FI_HD float sigmoid(X x, float bias = 0.f) {
#if defined(__CUDA_ARCH__)
  return inverse_on_gpu(1.f + exp2_on_gpu(x * -kLog2e + bias * -kLog2e));
#else
  return 1.f / (1.f + expf(-(x + bias)));
#endif
}

// In place of softmax (FlashSigmoid). The bias is about -log(keys).
struct Sigmoid : Feature {
  static constexpr bool kWholePast = true;
  struct Weight {
    float bias;

    template <class X>
    FI_HD float operator()(X x, Position) const {
      return sigmoid(x, bias);
    }
  };
  static constexpr bool kSoftmax = false;
  template <class A>
  FI_HD static Weight weights(const A& a, const Row&) {
    return Weight{a.sigmoid_bias};
  }
};

template <class X, class Y>
struct Both {
  X x;
  Y y;
  FI_HD bool sees(int32_t kv_pos) const { return x.sees(kv_pos) && y.sees(kv_pos); }
};
template <class X, class Y>
FI_HD Both<X, Y> both(X x, Y y) {
  return {x, y};
}

template <class F, class G>
struct Then {
  F first;
  G second;
  template <class X>
  FI_HD auto operator()(X x, Position kv_pos) const {
    return second(first(x, kv_pos), kv_pos);
  }
};
template <class F, class G>
FI_HD auto then(F first, G second) {
  if constexpr (std::is_same_v<F, Unchanged>)
    return second;
  else if constexpr (std::is_same_v<G, Unchanged>)
    return first;
  else
    return Then<F, G>{first, second};
}

template <class... F>
struct Compose;

template <>
struct Compose<> : Feature {
  static constexpr bool kWholePast = true;
  template <class A>
  FI_HD static KeyRange keys(const A&, const Row& r) {
    return {0, r.kv_len};
  }
};

template <class F, class... Rest>
struct Compose<F, Rest...> {
  using Next = Compose<Rest...>;
  static constexpr bool kHasQuery = F::kHasQuery || Next::kHasQuery;
  static constexpr bool kHasKey = F::kHasKey || Next::kHasKey;
  static constexpr bool kHasValue = F::kHasValue || Next::kHasValue;
  static constexpr bool kHasOutput = F::kHasOutput || Next::kHasOutput;
  static constexpr bool kHasLogits = F::kHasLogits || Next::kHasLogits;
  static constexpr bool kHasSink = F::kHasSink || Next::kHasSink;
  static constexpr bool kSoftmax = F::kSoftmax && Next::kSoftmax;
  static constexpr bool kWholePast = F::kWholePast && Next::kWholePast;
  static_assert(!(F::kHasSink && Next::kHasSink), "a variant has at most one sink");
  static_assert(F::kSoftmax || Next::kSoftmax, "a variant has at most one function of weights");
  static_assert(kSoftmax || !kHasSink, "a sink is a logit of the softmax");

  // clamped to [0, kv_len]; begin >= end: the row sees nothing
  template <class A>
  FI_HD static KeyRange keys(const A& a, const Row& r) {
    KeyRange x = F::keys(a, r), y = Next::keys(a, r);
    return {x.begin > y.begin ? x.begin : y.begin, x.end < y.end ? x.end : y.end};
  }
  template <class A>
  FI_HD static int32_t seen_before(const A& a, const Row& r) {
    int32_t x = F::seen_before(a, r), y = Next::seen_before(a, r);
    return x < y ? x : y;
  }
  template <class A>
  FI_HD static auto mask(const A& a, const Row& r) {
    return both(F::mask(a, r), Next::mask(a, r));
  }
  template <class A>
  FI_HD static auto logits(const A& a, const Row& r) {
    return then(F::logits(a, r), Next::logits(a, r));
  }
  template <class A, class X>
  FI_HD static auto query(const A& a, X x, const Row& r) {
    return Next::query(a, F::query(a, x, r), r);
  }
  template <class A, class X>
  FI_HD static auto key(const A& a, X x, const Key& k) {
    return Next::key(a, F::key(a, x, k), k);
  }
  template <class A, class X>
  FI_HD static auto value(const A& a, X x, const Key& k) {
    return Next::value(a, F::value(a, x, k), k);
  }
  template <class A>
  FI_HD static float output(const A& a, float x, const Row& r, int32_t d) {
    return Next::output(a, F::output(a, x, r, d), r, d);
  }
  template <class A>
  FI_HD static float sink(const A& a, int32_t q_head) {
    if constexpr (F::kHasSink)
      return F::sink(a, q_head);
    else
      return Next::sink(a, q_head);
  }
  template <class A>
  FI_HD static auto weights(const A& a, const Row& r) {
    return then(F::weights(a, r), Next::weights(a, r));
  }
};

// Of a row: makes a logit what softmax works on, or the weight itself. Of a hidden key that is kHidden.
template <class Variant, class A>
FI_HD auto transform_of(const A& a, const Row& r) {
  return then(Variant::logits(a, r), Variant::weights(a, r));
}
template <class Variant>
constexpr bool kTransforms = Variant::kHasLogits || !Variant::kSoftmax;
template <class Variant>
constexpr float kHidden = Variant::kSoftmax ? -INFINITY : 0.f;

}  // namespace fi
