// Host side of the prefix finder: what is sized when one is made, and the finder itself.
#pragma once
#include <vector>

#include "../prefix.h"

namespace fi {

// What a finder is made for. Counts and lengths are upper bounds.
struct PrefixConfig {
  int64_t group, kv_heads, head_dim_qk, head_dim_vo;
  int64_t tile_kv;
  int64_t max_requests;
  int64_t max_shared_tokens;  // query tokens that read prefixes; an equal share of them for each request
  int64_t max_kv_len;
  int64_t max_depth;
  int64_t always;  // 0 or 1: whatever is shared becomes a prefix
};

// Byte offsets into the finder's buffer (64-byte aligned), the PrefixTree first.
struct PrefixLayout {
  int64_t prefixes, prefix_of, places;
  int64_t totals, saved_in_all, tiles, attached, costs, readers, chains;
  int64_t bytes;
};

// Throws std::invalid_argument when the configuration makes no sense.
PrefixLayout prefix_layout(const PrefixConfig& config);

// buffer: layout.bytes, 64-byte aligned, zero at first, where the finder runs
// The batch and its page size are left for the caller.
FindParams find_params(const PrefixConfig& config, const PrefixLayout& layout, char* buffer);

// Writes the tree that csrc/smxx/prefix.cu writes, byte for byte. What is not in use is not touched.
void find_prefixes_host(const FindParams& params);

struct GivenPrefix {
  int64_t keys;
  std::vector<int64_t> requests;  // any order
};

// Writes the tree of prefixes that the user gives, the tree's places in the buffer of params included. Throws
// std::invalid_argument, before it writes, when they are no tree or do not fit the lengths of the batch.
void set_prefixes(const PrefixConfig& config, const FindParams& params, std::vector<GivenPrefix> given);

}  // namespace fi
