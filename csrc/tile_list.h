// Which KV tiles the rows of a row tile see: what the tile listers of host and device share. A lister is
// compiled for a variant, and for no types or head dims.
#pragma once
#include "fi_spec.h"
#include "schedule.h"

namespace fi {

// The query tokens of a row tile. Masks know no heads.
struct TileTokens {
  int32_t begin, end;                 // of the request
  int32_t request, position, kv_len;  // position: of the request's first query token
  int32_t q_first;                    // which that is in q

  FI_HD Row row(int32_t token) const {
    return {request, 0, position + token, kv_len, kv_len - position, q_first + token};
  }
};

FI_HD TileTokens tokens_of(const PlanParams& p, int32_t request, const Rows& r, int32_t index) {
  int32_t width = r.wide ? p.tile_q_wide : p.tile_q_narrow;
  int32_t first = index * width, last = first + at_most(width, r.rows - first) - 1;
  return {quotient32(first, p.group), quotient32(last, p.group) + 1, request, r.kv_len - r.tokens, r.kv_len,
          p.qo_indptr[request]};
}

// KV tiles [begin, end) of the tokens' key ranges, whose first and last bound the others'.
template <class Variant, class A>
FI_HD KeyRange tiles_in_range(const A& args, const TileTokens& tokens, int32_t tile_kv) {
  int32_t begin = at_least(Variant::keys(args, tokens.row(tokens.begin)).begin, 0);
  int32_t end = at_most(Variant::keys(args, tokens.row(tokens.end - 1)).end, tokens.kv_len);
  if (begin >= end) return {0, 0};
  return {quotient32(begin, tile_kv), ceil_div32(end, tile_kv)};
}

struct Seen {
  bool some, all;
};

// Of the keys first, first + step, ... of those in the row's range and in [begin, end); all: and none of
// [begin, end) is out of range. The lanes of a warp have a `first` each.
template <class Variant, class A>
FI_HD Seen seen_by(const A& args, const Row& row, int32_t begin, int32_t end, int32_t first, int32_t step) {
  KeyRange k = Variant::keys(args, row);
  const int32_t from = at_least(begin, k.begin), to = at_most(end, k.end);
  if (from >= to) return {false, false};
  const int32_t before = Variant::seen_before(args, row);
  Seen seen{from < before, from == begin && to == end};
  if (before >= to) return seen;
  const auto mask = Variant::mask(args, row);
  for (int32_t key = from + first; key < to && !(seen.some && !seen.all); key += step) {
    bool sees = mask.sees(key);
    seen.some |= sees;
    seen.all &= sees;
  }
  return seen;
}

}  // namespace fi
