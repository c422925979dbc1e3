// Finding the prefixes that requests share: one text for csrc/core/prefix.cpp and csrc/smxx/prefix.cuh, so
// that host and device write the same bytes. Why what they find is right: docs/formats.md.
//
// A request is a string of KV tiles, as long as it may share. Each request is attached to one before it with
// which it has most tiles in common: hashes find it, entries of the page tables decide. Requests so attached
// are a trie. Its nodes become prefixes where that pays.
#pragma once
#include "cost.h"
#include "params.h"
#include "schedule.h"

#if defined(__CUDACC__)
#define FI_TEAM __device__ __forceinline__
#define FI_UNROLL _Pragma("unroll")
#define FI_TURNS _Pragma("unroll 1")  // most often one, of many instructions that the GPU waits for
#else
#define FI_TEAM inline
#define FI_UNROLL
#define FI_TURNS
#endif

namespace fi {

constexpr int32_t kMaxPrefixDepth = 7;        // a budget takes 4 bits, see budget_at
constexpr int32_t kMaxFinderRequests = 1024;  // a trie of these fits shared memory, their numbers 10 bits

struct alignas(8) Attachment {
  int32_t to, tiles;  // a request before it, and how many tiles both begin with; -1, 0
};

struct FindTotals {
  int64_t possible;  // tiles that would not be read again, were all sharing free
  int64_t others;    // tiles of all requests besides these
  int64_t prefixes;  // tiles of all nodes
  int64_t benefit;   // of the best prefixes, in the units of PrefixPrices
  int64_t saved;     // of the tree
  int32_t tokens;    // likewise
  int32_t roots;     // the first key of requests that are attached to none
  int32_t attached;  // requests so far; 0 between two runs
};

// Input and output of a prefix finder, host or device.
struct FindParams {
  Batch batch;
  int32_t page_size, tile_kv;
  int32_t max_kv_len;    // tokens; what lies beyond is not looked at
  int32_t max_requests;  // also the distance between columns of the arrays below
  int32_t max_tokens;    // query tokens of a request that shares
  int32_t max_depth;     // prefixes above one another
  PrefixPrices prices;
  PrefixTree tree;
  // scratch
  FindTotals* totals;
  int64_t* saved_in_all;  // by all trees found so far, as PrefixHeader::saved
  int32_t* tiles;         // [max_requests] that each request may share
  int64_t* chains;        // [max_kv_len / tile_kv, max_requests] hash of a request's entries up to each tile
  Attachment* attached;   // [max_requests]
  int64_t* costs;         // [max_depth + 1, max_requests] of the nodes below a node, by what is left of depth
  int32_t* readers;       // [max_depth + 1, max_requests] of the node's keys among them
};

// Lengths read on the device cannot be refused. The keys of a request's query tokens are never shared.
FI_HD int32_t sharing_tiles(const FindParams& p, int32_t request) {
  int64_t tokens = int64_t(p.batch.qo_indptr[request + 1]) - p.batch.qo_indptr[request];
  int32_t kv_len = at_most(p.batch.kv_len[request], p.max_kv_len);
  if (tokens < 1 || tokens > p.max_tokens || kv_len < tokens) return 0;
  return quotient32(kv_len - int32_t(tokens), p.tile_kv);
}

// Whole tiles in the first entries of a page table, and entries in which the first tiles are.
FI_HD int32_t tiles_in(const FindParams& p, int32_t entries) {
  return quotient32(uint32_t(entries) * p.page_size, p.tile_kv);
}
FI_HD int32_t entries_for(const FindParams& p, int32_t tiles) {
  return ceil_div32(uint32_t(tiles) * p.tile_kv, p.page_size);
}

struct Entries {
  const int32_t* first;
  int64_t step;

  FI_HD int32_t operator[](int32_t index) const { return first[index * step]; }
};

FI_HD Entries entries_of(const Batch& b, int32_t request) {
  int64_t start = request;
  if (b.starts) {
    start = b.starts_are_64 ? static_cast<const int64_t*>(b.starts)[request]
                            : static_cast<const int32_t*>(b.starts)[request];
  }
  return {b.table + start * b.start_stride, b.entry_step};
}

// The hash of a prefix is the sum of its entries' hashes, so that it can be summed up in any order.
constexpr int64_t kHashMask = (int64_t(1) << 48) - 1;  // 2^15 of them fit a sum

FI_HD int64_t hash_of(int32_t index, int32_t entry) {
  uint64_t x = uint64_t(uint32_t(index)) << 32 | uint32_t(entry);
  x = (x + 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 29) * 0x94d049bb133111ebu;
  return int64_t(x ^ x >> 32) & kHashMask;
}

// hash: of all entries up to this one, by which some tiles end.
FI_HD void note_hash(const FindParams& p, int32_t request, int32_t index, int64_t hash) {
  int32_t end = at_most(tiles_in(p, index + 1), p.tiles[request]);
  FI_TURNS
  for (int32_t tile = tiles_in(p, index); tile < end; ++tile)
    p.chains[int64_t(tile) * p.max_requests + request] = hash;
}

FI_HD bool same_hash(const FindParams& p, int32_t a, int32_t b, int32_t tiles) {
  const int64_t* column = p.chains + int64_t(tiles - 1) * p.max_requests;
  return column[a] == column[b];
}

// Tiles that both begin with, as hashes say.
FI_HD int32_t common_tiles(const FindParams& p, int32_t a, int32_t b) {
  int32_t same = 0, most = at_most(p.tiles[a], p.tiles[b]);
  if (most == 0 || !same_hash(p, a, b, 1)) return 0;
  for (same = 1; same < most;) {
    int32_t middle = same + (most - same + 1) / 2;
    if (same_hash(p, a, b, middle)) {
      same = middle;
    } else {
      most = middle - 1;
    }
  }
  return same;
}

// Of `tiles` that are the same by their hashes, of which only the first `entries` entries are.
FI_HD Attachment attachment(const FindParams& p, int32_t to, int32_t tiles, int32_t entries) {
  tiles = at_most(tiles, tiles_in(p, entries));
  return {tiles > 0 ? to : -1, tiles};
}

// Attached where hashes misled, a request may share just as much with one before its leader.
FI_HD Attachment first_leader(const FindParams& p, int32_t request) {
  Attachment at = p.attached[request];
  while (at.tiles > 0 && p.attached[at.to].tiles >= at.tiles) at.to = p.attached[at.to].to;
  return at;
}

// Requests in the order of the one that they are attached to, then of how many tiles they share with it, then
// of their numbers. Those that are attached to none come last.
struct SortKey {
  int64_t bits;

  FI_HD static SortKey of(const Attachment& at, int32_t request) {
    int64_t to = at.tiles > 0 ? at.to : kMaxFinderRequests;
    return {to << 40 | int64_t(at.tiles) << 10 | request};
  }
  FI_HD static SortKey none() { return {INT64_MAX}; }
  FI_HD int32_t request() const { return int32_t(bits & 1023); }
  FI_HD int32_t tiles() const { return int32_t(bits >> 10 & ((1 << 30) - 1)); }
  FI_HD int32_t leader() const { return int32_t(bits >> 40); }
  FI_HD bool attached() const { return leader() < kMaxFinderRequests; }
  FI_HD bool same_node(const SortKey& other) const { return bits >> 10 == other.bits >> 10; }
};

// A node is the requests that have its tiles in common: the leader, which is the first of them, those
// attached to the leader at no fewer tiles, and all that are attached to these. Nodes are numbered in the
// order of their leaders, then of their tiles: so every node comes after those that it lies in.
struct Trie {
  SortKey* keys;  // [requests], and up to the next power of 2
  // of a request
  Attachment* attached;  // to the first of all requests that share so much with it
  int32_t* rank;         // its place among the keys
  int32_t* node;         // in which it meets its leader, -1: attached to none
  int32_t* home;         // the smallest that it is in, -1: none
  int32_t* begin;        // the first key of those attached to it
  int32_t* kept;         // the smallest prefix that it is in, -1: none
  int32_t* weight;       // tokens in prefixes, of it and of those attached to it and to them
  // of a key
  int32_t* sums;  // nodes, then weights before it
  // of a node
  int32_t* first;     // its first key
  int32_t* up;        // the smallest that it lies in, -1: none
  int32_t* children;  // nodes of which it is `up`
  int32_t* settled;   // of them, so far
  int32_t* leaves;    // requests of which it is the home
  int32_t* requests;
  int32_t* tokens;
  int32_t* keeps;   // bit j: it is a prefix if j may still be nested from here downwards
  int32_t* depth;   // prefixes above it, -1: it is none
  int32_t* number;  // prefixes before it

  FI_HD static int32_t width(int32_t requests) {  // keys
    int32_t width = 1;
    while (width < requests) width *= 2;
    return width;
  }
  FI_HD static int64_t bytes(int32_t requests) {
    return 8 * int64_t(width(requests)) + 4 * 19 * int64_t(requests);
  }

  FI_HD Trie(void* memory, int32_t n)
      : keys(static_cast<SortKey*>(memory)), attached(reinterpret_cast<Attachment*>(keys + width(n))) {
    int32_t* next = reinterpret_cast<int32_t*>(attached);
    rank = next += 2 * n;
    node = next += n;
    home = next += n;
    begin = next += n;
    kept = next += n;
    weight = next += n;
    sums = next += n;
    first = next += n;
    up = next += n;
    children = next += n;
    settled = next += n;
    leaves = next += n;
    requests = next += n;
    tokens = next += n;
    keeps = next += n;
    depth = next += n;
    number = next += n;
  }

  FI_HD int32_t tiles(int32_t node) const { return node < 0 ? 0 : keys[first[node]].tiles(); }
  FI_HD int32_t leader(int32_t node) const { return keys[first[node]].leader(); }
  FI_HD int32_t nearest_kept(int32_t node) const {
    while (node >= 0 && depth[node] < 0) node = up[node];
    return node;
  }
};

FI_HD int32_t tokens_of(const FindParams& p, int32_t request) {
  return p.batch.qo_indptr[request + 1] - p.batch.qo_indptr[request];
}

// Decides for each number of prefixes that may still be nested from here downwards whether this node is one,
// and hands what that costs on to the node above. Keys of a node that is no prefix are read by its readers:
// prefixes and requests right below. Greedy in that a node does not weigh what its readers cost the nodes
// above.
template <class Team>
FI_TEAM void settle(const FindParams& p, const Trie& t, const Team& team, int32_t node) {
  constexpr int32_t kColumns = kMaxPrefixDepth + 1;
  int64_t below[kColumns] = {};
  int32_t readers[kColumns];
  FI_UNROLL
  for (int32_t left = 0; left < kColumns; ++left) {
    readers[left] = t.leaves[node];
    if (left > p.max_depth || t.children[node] == 0) continue;
    below[left] = p.costs[left * p.max_requests + node];
    readers[left] += p.readers[left * p.max_requests + node];
  }
  const int32_t up = t.up[node], tokens = t.tokens[node];
  const int64_t keys = int64_t(t.tiles(node) - t.tiles(up)) * p.tile_kv * p.prices.key;
  int64_t unshared = 0, cost = 0;
  int32_t keeps = 0;
  FI_UNROLL
  for (int32_t left = 0; left < kColumns; ++left) {
    if (left > p.max_depth) continue;
    bool keep = false;
    cost = below[left] + keys * readers[left];
    if (left == 0) {
      unshared = cost;
    } else {
      const int64_t states = left == p.max_depth ? 2 : 1;  // a row's first prefix makes its rest partial too
      const int64_t shared = below[left - 1] + keys + p.prices.prefix + states * tokens * p.prices.state;
      keep = shared < cost;
      cost = keep ? shared : cost;
      keeps |= keep << left;
    }
    if (up >= 0) {
      team.add(&p.costs[left * p.max_requests + up], cost);
      team.add(&p.readers[left * p.max_requests + up], keep ? 1 : readers[left]);
    }
  }
  t.keeps[node] = keeps;
  if (up < 0) {
    team.add(&p.totals->benefit, unshared - cost);
  } else {
    team.add(&t.requests[up], t.requests[node]);
    team.add(&t.tokens[up], tokens);
  }
}

// What the prefixes above a node leave of max_depth.
FI_HD int32_t budget_at(const Trie& t, int32_t max_depth, int32_t node) {
  uint32_t left = 0x76543210;  // 4 bits for each budget above: what is left of it at the node
  for (int32_t m = t.up[node]; m >= 0; m = t.up[m]) {
    uint32_t through = 0;
    FI_TURNS
    for (int32_t budget = 0; budget <= max_depth; ++budget) {
      int32_t below = budget - (t.keeps[m] >> budget & 1);
      through |= (left >> 4 * below & 15) << 4 * budget;
    }
    left = through;
  }
  return left >> 4 * max_depth & 15;
}

// The first place of a request and those attached to it. A leader's own tokens come last, after those of whom
// it shares most with: so the places of each of its nodes are neighbours.
FI_HD int32_t first_place(const FindParams& p, const Trie& t, int32_t request) {
  uint32_t place = 0;  // sums may wrap, what lies between two does not
  for (int32_t r = request; r >= 0; r = t.attached[r].to) {
    int32_t to = t.attached[r].to;
    place += uint32_t(t.sums[t.rank[r]]) - uint32_t(t.sums[to < 0 ? p.totals->roots : t.begin[to]]);
  }
  return int32_t(place);
}

FI_HD Prefix prefix_at(const FindParams& p, const Trie& t, int32_t node) {
  const int32_t leader = t.leader(node), parent = t.nearest_kept(t.up[node]);
  return {first_place(p, t, leader) + t.weight[leader] - t.tokens[node],
          t.tokens[node],
          t.tiles(parent) * p.tile_kv,
          t.tiles(node) * p.tile_kv,
          leader,
          t.requests[node],
          parent < 0 ? -1 : t.number[parent],
          t.depth[node]};
}

// A team is one thread of the host or a CTA: member `rank` of `size`. add() is atomic and returns what was
// there, fence() orders what a thread adds, sync() is a barrier. scan() turns values into sums of those
// before and returns the sum of all; it and sort() begin and end with a barrier.
template <class Team, class F>
FI_TEAM void for_each(const Team& team, int32_t n, F&& f) {
  FI_TURNS
  for (int32_t i = team.rank; i < n; i += team.size) f(i);
}

// The nodes of what is attached. Returns how many.
template <class Team>
FI_TEAM int32_t build_trie(const FindParams& p, const Trie& t, const Team& team) {
  const int32_t n = p.batch.num_requests;
  auto opens_node = [&](int32_t i) {
    return t.keys[i].attached() && (i == 0 || !t.keys[i].same_node(t.keys[i - 1]));
  };
  team.sort(t.keys, Trie::width(n));
  for_each(team, n, [&](int32_t i) {
    t.sums[i] = opens_node(i);
    t.home[i] = -1;
    if (!t.keys[i].attached() && (i == 0 || t.keys[i - 1].attached())) p.totals->roots = i;
  });
  const int32_t nodes = team.scan(t.sums, n);
  for_each(team, n, [&](int32_t i) {
    const int32_t request = t.keys[i].request(), opens = opens_node(i);
    t.rank[request] = i;
    t.node[request] = t.keys[i].attached() ? t.sums[i] + opens - 1 : -1;
    if (opens) t.first[t.sums[i]] = i;
  });
  team.sync();
  for_each(team, nodes, [&](int32_t node) {
    const int32_t leader = t.leader(node);
    const bool outermost = node == 0 || t.leader(node - 1) != leader;
    if (outermost) t.begin[leader] = t.first[node];
    if (node + 1 == nodes || t.leader(node + 1) != leader) t.home[leader] = node;
    t.up[node] = outermost ? t.node[leader] : node - 1;
    if (t.up[node] >= 0) team.add(&t.children[t.up[node]], 1);
    FI_TURNS
    for (int32_t left = 0; left <= p.max_depth; ++left)
      p.costs[left * p.max_requests + node] = p.readers[left * p.max_requests + node] = 0;
  });
  team.sync();
  for_each(team, n, [&](int32_t r) {
    const int32_t home = t.home[r] >= 0 ? t.home[r] : t.node[r];
    t.home[r] = home;
    if (home < 0) return;
    team.add(&t.leaves[home], 1);
    team.add(&t.requests[home], 1);
    team.add(&t.tokens[home], tokens_of(p, r));
  });
  team.sync();
  return nodes;
}

// From the innermost nodes outwards, each by whoever comes last from below.
template <class Team>
FI_TEAM void settle_all(const FindParams& p, const Trie& t, const Team& team, int32_t nodes) {
  for_each(team, nodes, [&](int32_t node) {
    if (t.children[node] > 0) return;
    while (true) {
      settle(p, t, team, node);
      node = t.up[node];
      if (node < 0) return;
      team.fence();
      if (team.add(&t.settled[node], 1) + 1 < t.children[node]) return;
      team.fence();
    }
  });
  team.sync();
}

// What hidden_by_memory asks for.
template <class Team>
FI_TEAM void count_others(const FindParams& p, const Trie& t, const Team& team, int32_t nodes) {
  for_each(team, p.batch.num_requests, [&](int32_t r) {
    const int32_t kv_len = at_most(at_least(p.batch.kv_len[r], 0), p.max_kv_len);
    team.add(&p.totals->others, int64_t(ceil_div32(kv_len, p.tile_kv)) - t.attached[r].tiles);
  });
  for_each(team, nodes, [&](int32_t node) {
    team.add(&p.totals->prefixes, int64_t(t.tiles(node) - t.tiles(t.up[node])));
  });
}

FI_HD int64_t hidden(const FindParams& p) {
  const int64_t tile = p.tile_kv * p.prices.key;
  if (p.totals->prefixes * tile > p.prices.cached) return 0;
  return hidden_by_memory(p.totals->possible * tile, p.totals->others * tile);
}

template <class Team>
FI_TEAM void write_tree(const FindParams& p, const Trie& t, const Team& team, int32_t nodes) {
  const int32_t n = p.batch.num_requests;
  for_each(team, nodes, [&](int32_t node) {
    const int32_t budget = budget_at(t, p.max_depth, node);
    t.number[node] = t.keeps[node] >> budget & 1;
    t.depth[node] = t.number[node] ? p.max_depth - budget : -1;
  });
  const int32_t prefixes = team.scan(t.number, nodes);
  for_each(team, n, [&](int32_t r) {
    t.kept[r] = t.nearest_kept(t.home[r]);
    if (t.kept[r] < 0) return;
    const int32_t tokens = tokens_of(p, r);
    for (int32_t y = r; y >= 0; y = t.attached[y].to) team.add(&t.weight[y], tokens);
    team.add(&p.totals->tokens, tokens);
  });
  for_each(team, nodes, [&](int32_t node) {
    if (t.depth[node] < 0) return;
    const int64_t keys = int64_t(t.tiles(node) - t.tiles(t.nearest_kept(t.up[node]))) * p.tile_kv;
    team.add(&p.totals->saved, (t.requests[node] - 1) * keys);
  });
  team.sync();
  for_each(team, n, [&](int32_t i) { t.sums[i] = t.weight[t.keys[i].request()]; });
  team.scan(t.sums, n);
  for_each(team, nodes, [&](int32_t node) {
    if (t.depth[node] >= 0) p.tree.prefixes[t.number[node]] = prefix_at(p, t, node);
  });
  for_each(team, n, [&](int32_t r) {
    p.tree.prefix_of[r] = t.kept[r] < 0 ? -1 : t.number[t.kept[r]];
    if (t.kept[r] < 0) return;
    const int32_t tokens = tokens_of(p, r);
    Place* places = p.tree.places + first_place(p, t, r) + t.weight[r] - tokens;
    FI_TURNS
    for (int32_t i = 0; i < tokens; ++i) places[i] = {p.batch.qo_indptr[r] + i, r};
  });
  if (team.rank > 0) return;
  *p.tree.header = {prefixes, p.totals->tokens, p.totals->saved};
  *p.saved_in_all += p.totals->saved;
}

// attached -> the tree.
template <class Team>
FI_TEAM void build_tree(const FindParams& p, const Trie& t, const Team& team) {
  const int32_t n = p.batch.num_requests;
  if (team.rank == 0) *p.totals = {};
  team.sync();
  for_each(team, n, [&](int32_t r) {
    t.attached[r] = first_leader(p, r);
    t.keys[r] = SortKey::of(t.attached[r], r);
    t.weight[r] = t.children[r] = t.settled[r] = t.leaves[r] = t.requests[r] = t.tokens[r] = 0;
    if (t.attached[r].tiles > 0) team.add(&p.totals->possible, int64_t(t.attached[r].tiles));
  });
  for_each(team, Trie::width(n) - n, [&](int32_t i) { t.keys[n + i] = SortKey::none(); });
  team.sync();
  bool pays = p.totals->possible * p.tile_kv * p.prices.key > p.prices.least;  // without looking closely
  if (pays) {
    const int32_t nodes = build_trie(p, t, team);
    count_others(p, t, team, nodes);
    settle_all(p, t, team, nodes);
    pays = p.totals->benefit - hidden(p) > p.prices.least;
    if (pays) write_tree(p, t, team, nodes);
  }
  if (pays) return;
  for_each(team, n, [&](int32_t r) { p.tree.prefix_of[r] = -1; });
  if (team.rank == 0) *p.tree.header = {};
}

}  // namespace fi
