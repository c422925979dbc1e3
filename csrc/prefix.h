// Finding the prefixes that requests share: one text for csrc/core/prefix.cpp and csrc/smxx/prefix.cuh, so that
// host and device write the same bytes. Why what they find is right: docs/formats.md.
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
#else
#define FI_TEAM inline
#endif

namespace fi {

constexpr int32_t kMaxPrefixDepth = 7;  // a budget takes 4 bits, see budget_at
constexpr int32_t kDeviceFinderRequests = 1024;  // their trie lies in shared memory

struct alignas(8) Attachment {
  int32_t to, tiles;  // a request before it, and how many tiles both begin with; -1, 0
};

struct FindTotals {
  int64_t possible;  // tiles that would not be read again, were all sharing free
  int64_t benefit;   // of the best prefixes, in the units of PrefixPrices
  int64_t saved;     // of the tree
  int32_t prefixes, tokens;
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

// A node stands for the requests that have its tiles in common: the leader, the first of them, and those attached
// to it at no fewer tiles, with all that are attached to these. The node is named by the first request that is
// attached to the leader at just so many tiles. All arrays: [num_requests].
struct Trie {
  // of a request
  Attachment* attached;  // to the first request of all that share so much
  int32_t* home;         // the deepest node that it is in; -1: none
  int32_t* kept;         // the deepest prefix that it is in; -1: none
  int32_t* weight;       // tokens in prefixes, of it and those attached to it and to them
  int32_t* before;       // of those of one leader that come before it
  // of a node
  int32_t* node;      // its name; of other requests that of the node in which they meet their leader, or -1
  int32_t* up;        // the smallest that it lies in; -1: none
  int32_t* children;  // nodes of which it is `up`
  int32_t* settled;   // of them, so far
  int32_t* leaves;    // requests of which it is the home
  int32_t* requests;
  int32_t* tokens;
  int32_t* keeps;   // bit j: a prefix if j more are allowed from here downwards
  int32_t* depth;   // prefixes above it; -1: it is none
  int32_t* number;  // among the prefixes

  static constexpr int32_t kArrays = 16;  // of int32

  FI_HD Trie(int32_t* memory, int32_t n)
      : attached(reinterpret_cast<Attachment*>(memory)),
        home(memory + 2 * n),
        kept(memory + 3 * n),
        weight(memory + 4 * n),
        before(memory + 5 * n),
        node(memory + 6 * n),
        up(memory + 7 * n),
        children(memory + 8 * n),
        settled(memory + 9 * n),
        leaves(memory + 10 * n),
        requests(memory + 11 * n),
        tokens(memory + 12 * n),
        keeps(memory + 13 * n),
        depth(memory + 14 * n),
        number(memory + 15 * n) {}

  FI_HD bool is_node(int32_t request) const { return node[request] == request; }
  FI_HD int32_t tiles(int32_t node) const { return node < 0 ? 0 : attached[node].tiles; }
  FI_HD int32_t nearest_kept(int32_t node) const {
    while (node >= 0 && depth[node] < 0) node = up[node];
    return node;
  }
};

// Attached where hashes misled, a request may share just as much with one before its leader.
FI_HD Attachment first_leader(const FindParams& p, int32_t request) {
  Attachment at = p.attached[request];
  while (at.tiles > 0 && p.attached[at.to].tiles >= at.tiles) at.to = p.attached[at.to].to;
  return at;
}

// Compares a request with all others: which node it names, what that lies in, and what it leads.
FI_HD void link_request(const FindParams& p, const Trie& t, int32_t request) {
  const Attachment own = t.attached[request];
  int32_t node = -1, up = -1, led = -1;  // of the tiles found so far the most, and the first request with these
  for (int32_t s = 0; s < p.batch.num_requests; ++s) {
    const Attachment other = t.attached[s];
    if (other.tiles == 0) continue;
    if (other.to == own.to) {
      if (other.tiles == own.tiles && node < 0) node = s;
      if (other.tiles < own.tiles && other.tiles > t.tiles(up)) up = s;
    }
    if (other.to == request && other.tiles > t.tiles(led)) led = s;
  }
  t.node[request] = own.tiles > 0 ? node : -1;
  t.up[request] = up;
  t.home[request] = led >= 0 ? led : t.node[request];
}

// Decides for each number of prefixes that may still be nested from here downwards whether this node is one, and
// hands what that costs on to the node above. Keys of a node that is no prefix are read by its readers: prefixes
// and requests right below. Greedy in that a node does not weigh what its readers cost the nodes above.
template <class Team>
FI_TEAM void settle(const FindParams& p, const Trie& t, const Team& team, int32_t node) {
  const int32_t up = t.up[node], leaves = t.leaves[node], tokens = t.tokens[node];
  const int64_t keys = int64_t(t.tiles(node) - t.tiles(up)) * p.tile_kv * p.prices.key;
  int64_t one_less = 0, unshared = 0, cost = 0;
  int32_t keeps = 0;
  for (int32_t left = 0; left <= p.max_depth; ++left) {
    const int64_t column = int64_t(left) * p.max_requests, below = p.costs[column + node];
    const int32_t readers = leaves + p.readers[column + node];
    const int32_t states = left == p.max_depth ? 2 : 1;  // the first prefix of a row makes its rest partial too
    const int64_t price = p.prices.prefix + states * tokens * p.prices.state;
    const bool keep = left > 0 && one_less + keys + price < below + keys * readers;
    cost = keep ? one_less + keys + price : below + keys * readers;
    keeps |= keep << left;
    if (left == 0) unshared = cost;
    one_less = below;
    if (up >= 0) {
      team.add(&p.costs[column + up], cost);
      team.add(&p.readers[column + up], keep ? 1 : readers);
    }
  }
  t.keeps[node] = keeps;
  if (up < 0) {
    team.add(&p.totals->benefit, unshared - cost);
    return;
  }
  team.add(&t.requests[up], t.requests[node]);
  team.add(&t.tokens[up], tokens);
}

// What the prefixes above a node leave of max_depth.
FI_HD int32_t budget_at(const Trie& t, int32_t max_depth, int32_t node) {
  uint32_t left = 0x76543210;  // 4 bits for each budget above: what is left of it at the node
  for (int32_t m = t.up[node]; m >= 0; m = t.up[m]) {
    uint32_t through = 0;
    for (int32_t budget = 0; budget <= max_depth; ++budget) {
      int32_t below = budget - (t.keeps[m] >> budget & 1);
      through |= (left >> 4 * below & 15) << 4 * budget;
    }
    left = through;
  }
  return left >> 4 * max_depth & 15;
}

// Compares a request with all others: what comes before it.
FI_HD void order_request(const FindParams& p, const Trie& t, int32_t request) {
  const Attachment own = t.attached[request];
  const int32_t depth = t.depth[request];
  int32_t before = 0, number = 0;
  for (int32_t s = 0; s < p.batch.num_requests; ++s) {
    const Attachment other = t.attached[s];
    if (other.to == own.to && (other.tiles > own.tiles || (other.tiles == own.tiles && s < request)))
      before += t.weight[s];
    if (t.depth[s] >= 0)
      number += t.depth[s] < depth || (t.depth[s] == depth && other.to < own.to);
  }
  t.before[request] = before;
  t.number[request] = number;
}

// A leader's tokens come first, then those attached to it, deepest first, each with what is attached to it.
FI_HD int32_t first_place(const FindParams& p, const Trie& t, int32_t request) {
  int32_t place = t.before[request];
  for (int32_t y = t.attached[request].to; y >= 0; y = t.attached[y].to) {
    place += t.before[y];
    if (t.kept[y] >= 0) place += p.batch.qo_indptr[y + 1] - p.batch.qo_indptr[y];
  }
  return place;
}

FI_HD Prefix prefix_at(const FindParams& p, const Trie& t, int32_t node) {
  const int32_t leader = t.attached[node].to, parent = t.nearest_kept(t.up[node]);
  return {first_place(p, t, leader),
          t.tokens[node],
          t.tiles(parent) * p.tile_kv,
          t.tiles(node) * p.tile_kv,
          leader,
          t.requests[node],
          parent < 0 ? -1 : t.number[parent],
          t.depth[node]};
}

// A team is one thread of the host or a CTA: member `first` of `step`; sync() is a barrier, add() is atomic and
// returns what was there, fence() orders what a thread adds.
template <class Team, class F>
FI_TEAM void for_each(const Team& team, int32_t n, F&& f) {
  for (int32_t i = team.first; i < n; i += team.step) f(i);
}

// attached -> the tree.
template <class Team>
FI_TEAM void build_tree(const FindParams& p, const Trie& t, const Team& team) {
  const int32_t n = p.batch.num_requests;
  if (team.first == 0) *p.totals = {};
  team.sync();
  for_each(team, n, [&](int32_t r) {
    t.attached[r] = first_leader(p, r);
    t.weight[r] = t.children[r] = t.settled[r] = t.leaves[r] = t.requests[r] = t.tokens[r] = 0;
    t.depth[r] = -1;
    if (t.tiles(r) > 0) team.add(&p.totals->possible, int64_t(t.tiles(r)));
  });
  team.sync();
  bool pays = p.totals->possible * p.tile_kv * p.prices.key > p.prices.least;
  if (pays) {
    for_each(team, n, [&](int32_t r) {
      link_request(p, t, r);
      if (!t.is_node(r)) return;
      for (int32_t left = 0; left <= p.max_depth; ++left) {
        p.costs[int64_t(left) * p.max_requests + r] = 0;
        p.readers[int64_t(left) * p.max_requests + r] = 0;
      }
    });
    team.sync();
    for_each(team, n, [&](int32_t r) {
      if (t.is_node(r)) {
        if (t.up[r] < 0) t.up[r] = t.node[t.attached[r].to];
        if (t.up[r] >= 0) team.add(&t.children[t.up[r]], 1);
      }
      if (t.home[r] < 0) return;
      team.add(&t.leaves[t.home[r]], 1);
      team.add(&t.requests[t.home[r]], 1);
      team.add(&t.tokens[t.home[r]], p.batch.qo_indptr[r + 1] - p.batch.qo_indptr[r]);
    });
    team.sync();
    for_each(team, n, [&](int32_t r) {  // upwards, whoever comes last from below
      if (!t.is_node(r) || t.children[r] > 0) return;
      for (int32_t node = r;;) {
        settle(p, t, team, node);
        node = t.up[node];
        if (node < 0) return;
        team.fence();
        if (team.add(&t.settled[node], 1) + 1 < t.children[node]) return;
        team.fence();
      }
    });
    team.sync();
    pays = p.totals->benefit > p.prices.least;
  }
  if (!pays) {
    for_each(team, n, [&](int32_t r) { p.tree.prefix_of[r] = -1; });
    if (team.first == 0) *p.tree.header = {};
    return;
  }
  for_each(team, n, [&](int32_t r) {
    if (!t.is_node(r)) return;
    int32_t budget = budget_at(t, p.max_depth, r);
    if (t.keeps[r] >> budget & 1) t.depth[r] = p.max_depth - budget;
  });
  team.sync();
  for_each(team, n, [&](int32_t r) {
    t.kept[r] = t.nearest_kept(t.home[r]);
    if (t.kept[r] >= 0) {
      int32_t tokens = p.batch.qo_indptr[r + 1] - p.batch.qo_indptr[r];
      for (int32_t y = r; y >= 0; y = t.attached[y].to) team.add(&t.weight[y], tokens);
      team.add(&p.totals->tokens, tokens);
    }
    if (t.depth[r] >= 0) {
      int64_t keys = int64_t(t.tiles(r) - t.tiles(t.nearest_kept(t.up[r]))) * p.tile_kv;
      team.add(&p.totals->saved, (t.requests[r] - 1) * keys);
      team.add(&p.totals->prefixes, 1);
    }
  });
  team.sync();
  for_each(team, n, [&](int32_t r) { order_request(p, t, r); });
  team.sync();
  for_each(team, n, [&](int32_t r) {
    p.tree.prefix_of[r] = t.kept[r] < 0 ? -1 : t.number[t.kept[r]];
    if (t.depth[r] >= 0) p.tree.prefixes[t.number[r]] = prefix_at(p, t, r);
    if (t.kept[r] < 0) return;
    const int32_t begin = p.batch.qo_indptr[r], end = p.batch.qo_indptr[r + 1];
    Place* places = p.tree.places + first_place(p, t, r);
    for (int32_t token = begin; token < end; ++token) places[token - begin] = {token, r};
  });
  if (team.first == 0) *p.tree.header = {p.totals->prefixes, p.totals->tokens, p.totals->saved};
}

}  // namespace fi
