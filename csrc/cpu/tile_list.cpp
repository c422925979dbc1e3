// The tile lister of the host, for the variant in fi_spec.h.
#include "tile_list.h"

#include <cstring>

namespace fi::cpu {
namespace {

using spec::Args;
using spec::Variant;

void list_row_tile(const PlanParams& p, const Args& args, int32_t request, const Rows& r, int32_t index) {
  const TileTokens tokens = tokens_of(p, request, r, index);
  const KeyRange range = tiles_in_range<Variant>(args, tokens, p.tile_kv);
  const int64_t line = line_of(p, request, index);
  int32_t count = 0;
  for (int32_t tile = range.begin; tile < range.end; ++tile) {
    const int32_t begin = tile * p.tile_kv, end = at_most(begin + p.tile_kv, tokens.kv_len);
    Seen seen{false, end - begin == p.tile_kv};
    for (int32_t token = tokens.begin; token < tokens.end && !(seen.some && !seen.all); ++token) {
      Seen of_row = seen_by<Variant>(args, tokens.row(token), begin, end, 0, 1);
      seen = {seen.some || of_row.some, seen.all && of_row.all};
    }
    if (seen.some) p.list.tiles[line * p.list.width + count++] = ListedTile::of(tile, seen.all).entry;
  }
  p.list.counts[line] = count;
}

}  // namespace
}  // namespace fi::cpu

// Lengths beyond the list's capacities are left out: the planner refuses them.
extern "C" int fi_tile_list(const fi::ListParams* params, void*) {
  using namespace fi::cpu;
  const fi::PlanParams& p = params->plan;
  Args args;
  std::memcpy(static_cast<void*>(&args), params->variant_args, sizeof args);
#pragma omp parallel for schedule(dynamic, 1)
  for (int32_t request = 0; request < p.num_requests; ++request) {
    const fi::Rows r = rows_of(p, request);
    if (!fits_list(p, request, r)) continue;
    for (int32_t index = 0; index < row_tiles(p, r); ++index) list_row_tile(p, args, request, r, index);
  }
  return 0;
}

extern "C" const char* fi_error(int) { return "the host's tile lister reports no errors"; }
