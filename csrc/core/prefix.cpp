#include "prefix.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

namespace fi {
namespace {

template <class... T>
[[noreturn]] void refuse(const T&... words) {
  std::ostringstream text;
  (text << ... << words);
  throw std::invalid_argument(text.str());
}

void require_between(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) refuse("expected ", name, " from ", low, " to ", high, ", got ", value);
}

void check_config(const PrefixConfig& c) {
  constexpr int64_t kAny = INT32_MAX;
  require_between("q_heads / kv_heads", c.group, 1, kAny);
  require_between("kv_heads", c.kv_heads, 1, kAny);
  require_between("head_dim", c.head_dim_qk, 1, kAny);
  require_between("head_dim_vo", c.head_dim_vo, 1, kAny);
  require_between("tile_kv", c.tile_kv, 1, kMaxKvLen);
  require_between("max_requests", c.max_requests, 1, kMaxFinderRequests);
  if (c.max_shared_tokens < c.max_requests || c.max_shared_tokens > kAny)
    refuse("expected max_shared_tokens from ", c.max_requests, " (max_requests) to ", kAny, ", got ",
           c.max_shared_tokens);
  require_between("max_kv_len", c.max_kv_len, 1, kMaxKvLen);
  require_between("max_depth", c.max_depth, 1, kMaxPrefixDepth);
}

// For each request the first of those before it with which it has most tiles in common.
Attachment attach(const FindParams& p, int32_t request) {
  int32_t most = 0, to = -1;
  for (int32_t s = 0; s < request; ++s) {
    int32_t tiles = common_tiles(p, request, s);
    if (tiles > most) most = tiles, to = s;
  }
  if (most == 0) return {-1, 0};
  Entries a = entries_of(p.batch, request), b = entries_of(p.batch, to);
  int32_t entries = entries_for(p, most), same = 0;
  while (same < entries && a[same] == b[same]) ++same;
  return attachment(p, to, most, same);
}

void hash(const FindParams& p, int32_t request) {
  p.tiles[request] = sharing_tiles(p, request);
  Entries entries = entries_of(p.batch, request);
  int64_t sum = 0;
  for (int32_t i = 0; i < entries_for(p, p.tiles[request]); ++i) {
    sum = (sum + hash_of(i, entries[i])) & kHashMask;
    note_hash(p, request, i, sum);
  }
}

struct OneThread {
  static constexpr int32_t rank = 0, size = 1;
  void sync() const {}
  void fence() const {}
  template <class T>
  T add(T* to, T x) const {
    T before = *to;
    *to += x;
    return before;
  }
  int32_t scan(int32_t* values, int32_t count) const {
    uint32_t sum = 0;  // it may wrap
    for (int32_t i = 0; i < count; ++i) sum += uint32_t(std::exchange(values[i], int32_t(sum)));
    return int32_t(sum);
  }
  void sort(SortKey* keys, int32_t count) const {
    std::sort(keys, keys + count, [](SortKey a, SortKey b) { return a.bits < b.bits; });
  }
};

std::string text_of(const GivenPrefix& x) {
  std::ostringstream text;
  text << x.keys << " keys for requests [";
  for (size_t i = 0; i < x.requests.size(); ++i) text << (i ? ", " : "") << x.requests[i];
  text << "]";
  return text.str();
}

void check_given(const FindParams& p, const GivenPrefix& x) {
  const int64_t n = p.batch.num_requests;
  if (x.requests.empty() || x.requests.front() < 0 || x.requests.back() >= n)
    refuse("expected requests from 0 to ", n - 1, ", got a prefix of ", text_of(x));
  if (std::adjacent_find(x.requests.begin(), x.requests.end()) != x.requests.end())
    refuse("expected each request once, got a prefix of ", text_of(x));
  if (x.keys < 1 || x.keys % p.tile_kv != 0)
    refuse("expected a multiple of ", p.tile_kv, " keys (tile_kv), got a prefix of ", text_of(x));
  for (int64_t r : x.requests) {
    int64_t q_len = int64_t(p.batch.qo_indptr[r + 1]) - p.batch.qo_indptr[r], kv_len = p.batch.kv_len[r];
    if (q_len < 1 || x.keys > kv_len - q_len)
      refuse("expected keys before the query tokens of each request, got a prefix of ", text_of(x),
             ", of which ", r, " has ", kv_len, " keys and ", q_len, " query tokens");
  }
}

}  // namespace

PrefixLayout prefix_layout(const PrefixConfig& c) {
  check_config(c);
  PrefixLayout l{};
  int64_t end = 0;
  auto section = [&end](int64_t bytes) {
    int64_t begin = end;
    end = ceil_div(end + bytes, 64) * 64;
    return begin;
  };
  section(sizeof(PrefixHeader));
  l.prefixes = section(c.max_requests * sizeof(Prefix));
  l.prefix_of = section(c.max_requests * sizeof(int32_t));
  l.places = section(c.max_shared_tokens * sizeof(Place));
  l.totals = section(sizeof(FindTotals));
  l.saved_in_all = section(sizeof(int64_t));
  l.tiles = section(c.max_requests * sizeof(int32_t));
  l.attached = section(c.max_requests * sizeof(Attachment));
  l.costs = section((c.max_depth + 1) * c.max_requests * sizeof(int64_t));
  l.readers = section((c.max_depth + 1) * c.max_requests * sizeof(int32_t));
  l.chains = section(c.max_kv_len / c.tile_kv * c.max_requests * sizeof(int64_t));
  l.bytes = end;
  return l;
}

FindParams find_params(const PrefixConfig& c, const PrefixLayout& l, char* buffer) {
  FindParams p{};
  p.tile_kv = int32_t(c.tile_kv);
  p.max_kv_len = int32_t(c.max_kv_len);
  p.max_requests = int32_t(c.max_requests);
  p.max_tokens = int32_t(c.max_shared_tokens / c.max_requests);
  p.max_depth = int32_t(c.max_depth);
  p.prices = c.always ? PrefixPrices{1, 0, 0, 0, 0}
                      : prefix_prices(c.group, c.kv_heads, c.head_dim_qk, c.head_dim_vo);
  p.tree = {reinterpret_cast<PrefixHeader*>(buffer), reinterpret_cast<Prefix*>(buffer + l.prefixes),
            reinterpret_cast<int32_t*>(buffer + l.prefix_of), reinterpret_cast<Place*>(buffer + l.places)};
  p.totals = reinterpret_cast<FindTotals*>(buffer + l.totals);
  p.saved_in_all = reinterpret_cast<int64_t*>(buffer + l.saved_in_all);
  p.tiles = reinterpret_cast<int32_t*>(buffer + l.tiles);
  p.attached = reinterpret_cast<Attachment*>(buffer + l.attached);
  p.costs = reinterpret_cast<int64_t*>(buffer + l.costs);
  p.readers = reinterpret_cast<int32_t*>(buffer + l.readers);
  p.chains = reinterpret_cast<int64_t*>(buffer + l.chains);
  return p;
}

void find_prefixes_host(const FindParams& p) {
  const int32_t n = p.batch.num_requests;
  for (int32_t r = 0; r < n; ++r) hash(p, r);
  for (int32_t r = 0; r < n; ++r) p.attached[r] = attach(p, r);
  std::vector<int64_t> memory(ceil_div(Trie::bytes(n), sizeof(int64_t)));
  build_tree(p, Trie(memory.data(), n), OneThread{});
}

void set_prefixes(const PrefixConfig& c, const FindParams& p, std::vector<GivenPrefix> given) {
  const int32_t n = p.batch.num_requests, count = int32_t(given.size());
  if (int64_t(given.size()) > c.max_requests)
    refuse("expected at most ", c.max_requests, " prefixes (max_requests), got ", given.size());
  for (GivenPrefix& x : given) {
    std::sort(x.requests.begin(), x.requests.end());
    check_given(p, x);
  }
  std::stable_sort(given.begin(), given.end(), [](auto& a, auto& b) { return a.keys < b.keys; });
  std::vector<Prefix> prefixes(count);
  std::vector<int32_t> deepest(n, -1);
  int64_t total = 0, saved = 0;
  for (int32_t i = 0; i < count; ++i) {
    const GivenPrefix& x = given[i];
    const int32_t parent = deepest[x.requests[0]];
    const int32_t begin = parent < 0 ? 0 : prefixes[parent].kv_end;
    const int32_t depth = parent < 0 ? 0 : prefixes[parent].depth + 1;
    int64_t tokens = 0;
    for (int64_t r : x.requests) {
      if (deepest[r] != parent || begin == x.keys)
        refuse("expected prefixes that nest, got ", text_of(x), " and ",
               text_of(given[at_least(deepest[r], parent)]));
      deepest[r] = i;
      tokens += p.batch.qo_indptr[r + 1] - p.batch.qo_indptr[r];
    }
    if (depth == c.max_depth)
      refuse("expected at most ", depth,
             " prefixes above one another (max_depth), got one more: ", text_of(x));
    if (parent < 0) total += tokens;
    saved += (int64_t(x.requests.size()) - 1) * (x.keys - begin);
    prefixes[i] = {0,
                   int32_t(tokens),
                   begin,
                   int32_t(x.keys),
                   int32_t(x.requests[0]),
                   int32_t(x.requests.size()),
                   parent,
                   depth};
  }
  if (total > c.max_shared_tokens)
    refuse("expected at most ", c.max_shared_tokens, " query tokens in prefixes (max_shared_tokens), got ",
           total);

  int32_t free = 0;
  std::vector<int32_t> inside(count);  // the first free place of each
  for (int32_t i = 0; i < count; ++i) {
    int32_t& place = prefixes[i].parent < 0 ? free : inside[prefixes[i].parent];
    prefixes[i].first = inside[i] = place;
    place += prefixes[i].tokens;
    p.tree.prefixes[i] = prefixes[i];
  }
  for (int32_t r = 0; r < n; ++r) {
    p.tree.prefix_of[r] = deepest[r];
    if (deepest[r] < 0) continue;
    for (int32_t token = p.batch.qo_indptr[r]; token < p.batch.qo_indptr[r + 1]; ++token)
      p.tree.places[inside[deepest[r]]++] = {token, r};
  }
  *p.tree.header = {count, int32_t(total), saved};
}

}  // namespace fi
