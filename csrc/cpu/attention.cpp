// The CPU executor: the definition of what every executor computes, in plain loops over the same work items.
#include <algorithm>
#include <cmath>
#include <memory>

#include "element.h"
#include "fi_spec.h"
#include "params.h"
#include "state.h"
#include "tile_math.h"
#include "tiles.h"
#include "timer.h"
#include "variant.h"

namespace fi::cpu {
namespace {

#if defined(FI_ELEMENT_BF16)
using Element = BF16;
#elif defined(FI_ELEMENT_F16)
using Element = F16;
#else
using Element = float;
#endif
using spec::Args;
using spec::kBatchInvariant;
using spec::kHeadDimQk;
using spec::kHeadDimVo;
using spec::kLevels;
using spec::kProfile;
using spec::kTileList;
using spec::Variant;

constexpr Tiles kTiles = tiles_for(FI_ROOM, FI_ARCH, kHeadDimQk, kHeadDimVo);
constexpr int kRows = kTiles.q_wide, kKeys = kTiles.kv;
constexpr int kChunk = kChunkTiles * kKeys;
constexpr int kPadQk = pad(kHeadDimQk, kLanes), kPadVo = pad(kHeadDimVo, 4 * kLanes);
static_assert(kRows % 2 == 0 && kTiles.q_narrow % 2 == 0 && kKeys % 4 == 0,
              "tile_math works on 2 rows, 4 keys");

// Everything one thread needs for one work item. Padding stays 0 from the start.
struct alignas(64) Tile {
  float q[kRows][kPadQk] = {};
  float o[kRows][kPadVo];
  float k[kKeys][kPadQk] = {};
  float v[kKeys][kPadVo] = {};
  float s[2][kKeys];
  State state[kRows];
  Row row[kRows];
  KeyRange keys[kRows];
  int rows;
  bool whole = false;  // every row sees all keys of the KV tile at hand
};

// A vector as transforms see it.
template <int kElements>
struct Vector {
  static constexpr int kDim = kElements;
  const float* x;

  float operator[](Dim d) const { return x[d]; }
  template <class F>
  float sum(F f) const {
    float total = 0.f;
    for (int d = 0; d < kDim; ++d) total += f(Dim{0, d});
    return total;
  }
};

// x becomes transform(x).
template <int kDim, class Transform>
void replace(float* x, Transform transform) {
  float old[kDim];
  std::copy_n(x, kDim, old);
  auto changed = transform(Vector<kDim>{old});
  for (int d = 0; d < kDim; ++d) x[d] = changed[Dim{0, d}];
}

Tile& my_tile() {
  thread_local std::unique_ptr<Tile> tile(new Tile);
  return *tile;
}

int64_t first_token(const AttentionParams& p, int32_t request) { return p.batch.qo_indptr[request]; }

int32_t tokens_of(const AttentionParams& p, int32_t request) {
  return p.batch.qo_indptr[request + 1] - p.batch.qo_indptr[request];
}

// The prefix that an item is of, null: a request's own keys.
const Prefix* prefix_of(const AttentionParams& p, const WorkItem& w) {
  return kLevels && w.request < 0 ? p.prefixes + ~w.request : nullptr;
}

int rows_of(const AttentionParams& p, const WorkItem& w) {
  const Prefix* prefix = prefix_of(p, w);
  int64_t tokens = prefix ? prefix->tokens : tokens_of(p, w.request);
  int64_t left = tokens * p.group - w.row_begin;
  return int(std::min<int64_t>(left, w.flags & kWideTile ? kTiles.q_wide : kTiles.q_narrow));
}

// Which of q's and out's rows is row i of the tile.
struct QueryRow {
  int64_t token;
  int32_t head, request;
};
QueryRow query_row(const AttentionParams& p, const WorkItem& w, int i) {
  const Prefix* prefix = prefix_of(p, w);
  int32_t nth = (w.row_begin + i) / p.group, head = w.kv_head * p.group + (w.row_begin + i) % p.group;
  if (!prefix) return {first_token(p, w.request) + nth, head, w.request};
  const Place& place = p.places[prefix->first + nth];
  return {place.token, head, place.request};
}

Row row_at(const AttentionParams& p, const QueryRow& at) {
  return row_of_token(p.batch, at.request, at.head, int32_t(at.token));
}

void load_rows(const AttentionParams& p, const Args& args, const WorkItem& w, Tile& t) {
  t.rows = rows_of(p, w);
  for (int i = 0; i < t.rows; ++i) {
    QueryRow at = query_row(p, w, i);
    t.row[i] = row_at(p, at);
    t.keys[i] = Variant::keys(args, t.row[i]);
    const Element* q = static_cast<const Element*>(p.q) + at.token * p.q_token + at.head * p.q_head;
    for (int d = 0; d < kHeadDimQk; ++d) t.q[i][d] = to_float(q[d]);
    if constexpr (Variant::kHasQuery)
      replace<kHeadDimQk>(t.q[i], [&](auto x) { return Variant::query(args, x, t.row[i]); });
  }
}

// Keys that at least one of the rows may see, and no others in between are read: they may be poison.
KeyRange range_of_rows(const Tile& t) {
  KeyRange range{INT32_MAX, 0};
  for (int i = 0; i < t.rows; ++i) {
    if (t.keys[i].begin >= t.keys[i].end) continue;
    range.begin = std::min(range.begin, t.keys[i].begin);
    range.end = std::max(range.end, t.keys[i].end);
  }
  return range;
}

// Those that this item covers.
KeyRange range_of(const WorkItem& w, const Tile& t) {
  KeyRange range = range_of_rows(t);
  // planned from an upper bound of kv_len, a window begins lower than the plan thought
  if (!(w.flags & kFirstPiece)) range.begin = std::max(range.begin, w.kv_begin);
  range.end = std::min(range.end, w.kv_end);
  return range.begin < range.end ? range : KeyRange{0, 0};
}

int64_t page_of(const Batch& b, int32_t request, int32_t index, int32_t page_size) {
  int64_t start = request;
  if (b.starts) {
    start = b.starts_are_64 ? static_cast<const int64_t*>(b.starts)[request]
                            : static_cast<const int32_t*>(b.starts)[request];
  }
  int32_t entry = b.table[start * b.start_stride + int64_t(index) * b.entry_step];
  return b.entries_are_slots ? entry / page_size : entry;
}

// Keys [begin, end) of a KV tile to their places in t.k and t.v; before them, and after them up to a multiple
// of 4, the rest is 0.
void load_keys(const AttentionParams& p, const Args& args, const WorkItem& w, int32_t begin, int32_t end,
               Tile& t) {
  const KVCache& kv = p.kv;
  const Prefix* prefix = prefix_of(p, w);
  const int32_t request = prefix ? prefix->request : w.request;
  int32_t origin = begin / kKeys * kKeys;
  for (int32_t pos = begin; pos < end;) {
    int32_t index = pos / kv.page_size, offset = pos % kv.page_size;
    int32_t run = std::min(kv.page_size - offset, end - pos);
    int64_t page = page_of(p.batch, request, index, kv.page_size);
    const Element* k = static_cast<const Element*>(kv.k) + page * kv.k_page + w.kv_head * kv.k_head;
    const Element* v = static_cast<const Element*>(kv.v) + page * kv.v_page + w.kv_head * kv.v_head;
    for (int32_t i = 0; i < run; ++i) {
      float* to_k = t.k[pos - origin + i];
      float* to_v = t.v[pos - origin + i];
      const Element* from_k = k + (offset + i) * kv.k_token;
      const Element* from_v = v + (offset + i) * kv.v_token;
      for (int d = 0; d < kHeadDimQk; ++d) to_k[d] = to_float(from_k[d]);
      for (int d = 0; d < kHeadDimVo; ++d) to_v[d] = to_float(from_v[d]);
      const Key key{request, w.kv_head, pos + i, p.batch.kv_len[request]};
      if constexpr (Variant::kHasKey)
        replace<kHeadDimQk>(to_k, [&](auto x) { return Variant::key(args, x, key); });
      if constexpr (Variant::kHasValue)
        replace<kHeadDimVo>(to_v, [&](auto x) { return Variant::value(args, x, key); });
    }
    pos += run;
  }
  auto clear = [&t](int from, int to) {
    std::fill(t.k[from], t.k[to], 0.f);
    std::fill(t.v[from], t.v[to], 0.f);
  };
  clear(0, begin - origin);
  clear(end - origin, pad(end - origin, 4));
}

// Turns one row's scaled products with keys [begin, begin + count) into weights; returns what to keep of the
// old output. Where a key stands in the tile depends on its position alone, and so does the order of the sum.
float softmax_row(const Args& args, int32_t begin, int count, int i, Tile& t, float* s) {
  int lo = std::clamp(t.keys[i].begin - begin, 0, count);
  int hi = std::clamp(t.keys[i].end - begin, lo, count);
  for (int j = 0; j < lo; ++j) s[j] = 0.f;
  for (int j = hi; j < pad(count, 4); ++j) s[j] = 0.f;
  if (lo == hi) return 1.f;

  if constexpr (kTransforms<Variant>) {
    const auto transform = transform_of<Variant>(args, t.row[i]);
    for (int j = lo; j < hi; ++j) s[j] = transform(Logit{s[j], 1.f}, Position{begin + j, 0});
  }
  if constexpr (Variant::kSoftmax) {
    for (int j = lo; j < hi; ++j) s[j] *= kLog2e;
  }
  if (int j = std::max(lo, Variant::seen_before(args, t.row[i]) - begin); j < hi && !t.whole) {
    const auto mask = Variant::mask(args, t.row[i]);
    for (; j < hi; ++j) {
      if (!mask.sees(begin + j)) s[j] = kHidden<Variant>;
    }
  }
  if constexpr (!Variant::kSoftmax) return 1.f;
  float top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int j = lo; j < hi; ++j) top = s[j] > top ? s[j] : top;
  State& state = t.state[i];
  float reference =
      state.max > top ? state.max : top;  // one reference for old and new: nothing to rescale twice
  // -inf: every key is hidden, or all are NaN, which the comparison above passes over
  float base = reference == -INFINITY ? 0.f : reference;
  float mass = 0.f;
#pragma omp simd reduction(+ : mass)
  for (int j = lo; j < hi; ++j) {
    s[j] = exp2_negative(s[j] - base);
    mass += s[j];
  }
  return state.join(reference, mass).keep;
}

void clear(Tile& t) {
  std::fill_n(t.state, t.rows, State::of<Variant>(-INFINITY, 0.f));
  std::fill(t.o[0], t.o[pad(t.rows, 2)], 0.f);
}

// Keys [begin, end) of one KV tile.
void attend_tile(const AttentionParams& p, const Args& args, const WorkItem& w, int32_t begin, int32_t end,
                 Tile& t) {
  int32_t origin = begin / kKeys * kKeys;
  int count = end - origin;
  load_keys(p, args, w, begin, end, t);
  for (int i = 0; i < t.rows; i += 2) {
    dot_rows<kPadQk, kKeys>(t.q[i], t.k[0], pad(count, 4), p.scale, t.s[0]);
    float keep[2] = {1.f, 1.f};
    keep[0] = softmax_row(args, origin, count, i, t, t.s[0]);
    // the row that pads an odd count computes numbers that nobody reads
    if (i + 1 < t.rows) keep[1] = softmax_row(args, origin, count, i + 1, t, t.s[1]);
    add_values<kPadVo, kKeys>(t.s[0], t.v[0], pad(count, 4), keep, t.o[i]);
  }
}

void attend(const AttentionParams& p, const Args& args, const WorkItem& w, KeyRange range, Tile& t) {
  clear(t);
  for (int32_t begin = range.begin; begin < range.end;) {
    int32_t end = std::min(begin / kKeys * kKeys + kKeys, range.end);
    attend_tile(p, args, w, begin, end, t);
    begin = end;
  }
}

void attend_listed(const AttentionParams& p, const Args& args, const WorkItem& w, Tile& t) {
  clear(t);
  KeyRange range = range_of_rows(t);
  int32_t rows_before = int32_t(first_token(p, w.request) - p.batch.qo_indptr[0]) * p.group;
  int64_t line = tile_line(w.request, rows_before, kRows, w.row_begin / kRows);
  const int32_t* tiles = p.tile_list + line * p.tile_list_width;
  for (int32_t n = w.kv_begin / kKeys; n < w.kv_end / kKeys; ++n) {
    const ListedTile listed{tiles[n]};
    const int32_t origin = listed.tile() * kKeys;
    t.whole = listed.whole();
    int32_t begin = std::max(origin, range.begin), end = std::min(origin + kKeys, range.end);
    if (begin < end) attend_tile(p, args, w, begin, end, t);
  }
}

void write_row(const AttentionParams& p, const Args& args, const Row& row, State state, const float* o) {
  Element* out = static_cast<Element*>(p.out) + row.q_token * p.o_token + row.q_head * p.o_head;
  float factor = state.finish<Variant>(args, row.q_head);
  for (int d = 0; d < kHeadDimVo; ++d)
    out[d] = from_float<Element>(Variant::output(args, o[d] * factor, row, d));
  if (p.lse) p.lse[int64_t(row.q_token) * p.kv_heads * p.group + row.q_head] = state.lse() * kLn2;
}

void store(const AttentionParams& p, const Args& args, const WorkItem& w, const Tile& t) {
  const int64_t first = first_state(p, w.slot);
  for (int i = 0; i < t.rows; ++i) {
    if (first < 0) {
      write_row(p, args, t.row[i], t.state[i], t.o[i]);
      continue;
    }
    int64_t at = first + i;
    p.partial_lse[at] = t.state[i].lse();
    float inverse = t.state[i].inverse();
    for (int d = 0; d < kHeadDimVo; ++d) p.partial_o[at * kHeadDimVo + d] = t.o[i][d] * inverse;
  }
}

// Batch invariant: the chunk in t joins the state of its piece; the last one of an unsplit tile writes the
// rows.
void join_chunk(const AttentionParams& p, const Args& args, const WorkItem& w, int64_t at, bool first,
                bool last, Tile& t) {
  for (int i = 0; i < t.rows; ++i, ++at) {
    float* o = p.partial_o + at * kHeadDimVo;
    State state = first ? State::empty() : State{p.partial_lse[at], p.partial_sum[at]};
    State::Factors f = state.join(t.state[i].lse());
    float inverse = t.state[i].inverse();
    for (int d = 0; d < kHeadDimVo; ++d)
      t.o[i][d] = State::joined(first ? 0.f : o[d], f, t.o[i][d] * inverse);
    if (last && w.slot < 0) {
      write_row(p, args, t.row[i], state, t.o[i]);
      continue;
    }
    std::copy_n(t.o[i], kHeadDimVo, o);
    p.partial_lse[at] = state.max;
    p.partial_sum[at] = state.sum;
  }
}

void attend_in_chunks(const AttentionParams& p, const Args& args, const WorkItem& w, int32_t worker,
                      Tile& t) {
  KeyRange range = range_of(w, t);
  int64_t state = state_of_piece(p, w.slot, worker, kRows);
  int32_t begin = range.begin;
  do {
    int32_t end = std::min((begin / kChunk + 1) * kChunk, range.end);
    attend(p, args, w, {begin, end}, t);
    join_chunk(p, args, w, state, begin == range.begin, end == range.end, t);
    begin = end;
  } while (begin < range.end);
}

// Partial states of one row, joined one after the other.
struct Joined {
  State state = State::empty();
  float o[kHeadDimVo] = {};

  void add(const AttentionParams& p, int64_t at) {
    State::Factors f = state.join(p.partial_lse[at], kBatchInvariant ? p.partial_sum[at] : 1.f);
    for (int d = 0; d < kHeadDimVo; ++d) o[d] = State::joined(o[d], f, p.partial_o[at * kHeadDimVo + d]);
  }
};

// w.kv_begin .. w.kv_end are slots here, joined in their order.
void merge(const AttentionParams& p, const Args& args, const WorkItem& w) {
  if (kLevels && w.request < 0) return;  // merge_place joins these
  int rows = rows_of(p, w);
  for (int i = 0; i < rows; ++i) {
    Joined joined;
    for (int32_t slot = w.kv_begin; slot < w.kv_end; ++slot)
      joined.add(p, int64_t(slot) * p.partial_rows + i);
    write_row(p, args, row_at(p, query_row(p, w, i)), joined.state, joined.o);
  }
}

// Composable formats: the states that one query token's rows have in several nodes, see schedule.h.
void merge_place(const AttentionParams& p, const Args& args, int32_t place) {
  const Levels& levels = *p.levels;
  const Place& at = p.places[place];
  for (int32_t head = 0; head < p.kv_heads * p.group; ++head) {
    const int32_t kv_head = head / p.group;
    Joined joined;
    for (int32_t k = 0; k < levels.count; ++k) {
      const Part& part = levels.parts[int64_t(place) * levels.count + k];
      if (part.segment < 0) break;
      const int32_t width = part.row & 1 ? kTiles.q_wide : kTiles.q_narrow;
      const int32_t packed = part.row / 2 + head % p.group, segment = part.segment + packed / width;
      const int32_t* cuts = levels.unit_cuts + kv_head * p.header->segments + segment;
      const CutCount before{cuts[0]}, after{cuts[1]};
      joined.add(p, kv_head * p.header->state_rows + levels.segment_rows[segment] + packed % width);
      for (int32_t i = 1; i <= after.cuts() - before.cuts(); ++i)
        joined.add(p, int64_t(levels.first_slot + before.slots() + i) * p.partial_rows + packed % width);
    }
    write_row(p, args, row_at(p, {at.token, head, at.request}), joined.state, joined.o);
  }
}

void run(const AttentionParams& p) {
  const Args args = args_of<Args>(p);
#pragma omp parallel if (p.header->items > 1)
  {
    Tile& tile = my_tile();
#pragma omp for schedule(dynamic, 1)
    for (int32_t worker = 0; worker < p.workers; ++worker) {
      for (int32_t n = p.worker_indptr[worker]; n < p.worker_indptr[worker + 1]; ++n) {
        const WorkItem& w = p.items[n];
        ItemTimer<kProfile>::start(p, n);
        load_rows(p, args, w, tile);
        if constexpr (kBatchInvariant) {
          attend_in_chunks(p, args, w, worker, tile);
        } else {
          if constexpr (kTileList) {
            attend_listed(p, args, w, tile);
          } else {
            attend(p, args, w, range_of(w, tile), tile);
          }
          store(p, args, w, tile);
        }
        ItemTimer<kProfile>::stop(p, n);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int32_t n = 0; n < p.header->merges; ++n) {
      ItemTimer<kProfile>::start(p, p.header->items + n);
      merge(p, args, p.merges[n]);
      ItemTimer<kProfile>::stop(p, p.header->items + n);
    }
    const int32_t places = kLevels ? p.header->places : 0;
#pragma omp for schedule(static)
    for (int32_t place = 0; place < places; ++place) merge_place(p, args, place);
  }
}

}  // namespace
}  // namespace fi::cpu

extern "C" int fi_attention(const fi::AttentionParams* params, void*) {
  fi::cpu::run(*params);
  return 0;
}

extern "C" const char* fi_error(int) { return "the CPU executor reports no errors"; }
