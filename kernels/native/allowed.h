// A mask that is in memory: which keys each query may attend.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "site.h"

extern "C" {

struct Allowed {  // a [batch, head, query, key] tensor of bytes, not 0: allowed; keys are contiguous
  const uint8_t* data;
  int64_t batch, head, query;  // 0: the same for all
};

}  // extern "C"

namespace prescore {

// Of eight bytes: 1 for each that is not 0.
inline uint64_t ones(uint64_t x) {
  constexpr uint64_t LOW = 0x7f7f7f7f7f7f7f7f;
  return (((x & LOW) + LOW) | x) >> 7 & 0x0101010101010101;
}

inline uint64_t eight(const uint8_t* from) {
  uint64_t x;
  std::memcpy(&x, from, 8);
  return x;
}

// Of up to 16 bytes: bit i for byte i that is not 0.
inline uint32_t bits_of(const uint8_t* from, int64_t count) {
  uint8_t bytes[16] = {};
  if (count < 16) {
    std::memcpy(bytes, from, count);
    from = bytes;
  }
  constexpr uint64_t GATHER = 0x0102040810204080;  // byte i of ones to bit 56 + i of the product
  return (uint32_t)(ones(eight(from)) * GATHER >> 56 | ones(eight(from + 8)) * GATHER >> 56 << 8);
}

typedef uint8_t bytes_of_vec __attribute__((vector_size(L)));

// A mask of numbers, which are added to logits, as bytes: 1 for 0.0, 0 for what hides a key, at most `lowest`.
struct AsBytes {
  const View& mask;
  int64_t batch, heads, queries, keys;
  float lowest;
  uint8_t* to;
  uint8_t* none;                  // of each query: 1 where it has no key
  std::atomic<bool> hides{true};  // no other number is there

  using Scratch = std::vector<float>;
  Scratch scratch() const { return Scratch(keys); }

  void run(int64_t row, Scratch& numbers) {  // one task: one query's
    if (!hides) return;
    const int64_t q = row % queries, h = row / queries % heads, b = row / queries / heads;
    read(mask, b, h, q, keys, numbers.data());
    const float* from = numbers.data();
    uint8_t* out = to + row * keys;
    int64_t k = 0, some = 0, other = 0;
    ivec zeros = {}, others = {};
    for (; k + L <= keys; k += L) {
      const ivec zero = load(from + k) == 0.0f;
      zeros |= zero;
      others |= ~(zero | (load(from + k) <= lowest));
      const auto bytes = __builtin_convertvector(zero, bytes_of_vec);
      const bytes_of_vec one = bytes & 1;
      std::memcpy(out + k, &one, L);
    }
    for (; k < keys; ++k) {
      out[k] = from[k] == 0.0f;
      some |= out[k];
      other |= !(out[k] || from[k] <= lowest);
    }
    none[row] = !(some || bits(zeros));
    if (other || bits(others)) hides = false;
  }
};

// Whether each query may attend just the keys that the last one of its batch may: all of them, or those up to its own,
// where the last query's is number `used`.
struct Recognized {
  const Geometry& g;
  const Allowed& allowed;
  bool causal;
  int64_t used;
  std::atomic<bool> same{true};

  struct Nothing {};
  Nothing scratch() const { return {}; }

  const uint8_t* row(int64_t b, int64_t h, int64_t q) const {
    return allowed.data + b * allowed.batch + h * allowed.head + q * allowed.query;
  }

  void run(int64_t task, Nothing&) {  // one query's
    if (!same) return;
    const int64_t heads = allowed.head ? g.heads : 1, queries = allowed.query ? g.q_len : 1;
    const int64_t q = task % queries, h = task / queries % heads, b = task / queries / heads;
    const uint8_t *own = row(b, h, q), *last = row(b, 0, g.q_len - 1);
    const int64_t end = causal ? q + 1 + used - g.q_len : g.k_len;
    uint64_t differ = 0;
    int64_t k = 0;
    for (; k + 8 <= end; k += 8) differ |= ones(eight(own + k)) ^ ones(eight(last + k));
    for (; k < end; ++k) differ |= (own[k] != 0) ^ (last[k] != 0);
    for (; k + 8 <= g.k_len; k += 8) differ |= eight(own + k);
    for (; k < g.k_len; ++k) differ |= own[k];
    if (differ) same = false;
  }

  bool find() {
    const int64_t rows = (allowed.query ? g.q_len : 1) * (allowed.head ? g.heads : 1) * (allowed.batch ? g.batch : 1);
    parallel(0, rows, g.threads, *this);
    return same;
  }
};

// Which blocks of keys each tile of queries may see any key of, so that a mask is not read again where it hides all.
struct Visible {
  static constexpr int64_t BLOCK = 64;  // keys
  const Geometry& g;
  const Allowed& allowed;
  const std::vector<Span>& tiles;
  int64_t batch = allowed.data ? (allowed.batch ? g.batch : 1) : 0, heads = allowed.head ? g.heads : 1;
  int64_t count = tiles.size(), blocks = (g.k_len + BLOCK - 1) / BLOCK;
  std::vector<uint8_t> some = std::vector<uint8_t>(batch * heads * count * blocks);

  struct Nothing {};
  Nothing scratch() const { return {}; }

  void run(int64_t task, Nothing&) {
    const Span& tile = tiles[task % count];
    const int64_t b = task / count / heads, h = task / count % heads;
    uint8_t* own = &some[task * blocks];
    for (int64_t q = tile.begin; q < (allowed.query ? tile.end : tile.begin + 1); ++q) {
      const uint8_t* row = allowed.data + b * allowed.batch + h * allowed.head + q * allowed.query;
      for (int64_t block = 0; block < blocks; ++block)
        if (!own[block]) own[block] = any(row + block * BLOCK, std::min(BLOCK, g.k_len - block * BLOCK));
    }
  }

  static bool any(const uint8_t* from, int64_t size) {
    int64_t at = 0;
    uint64_t found = 0;
    for (; at + 8 <= size; at += 8) found |= eight(from + at);
    for (; at < size; ++at) found |= from[at];
    return found != 0;
  }

  void find() { parallel(0, batch * heads * count, g.threads, *this); }

  // The share of blocks, of all tiles, that are seen.
  double share() const {
    int64_t total = 0;
    for (const uint8_t one : some) total += one;
    return (double)total / (double)std::max<int64_t>(some.size(), 1);
  }

  // Whether any query head of a KV head sees, in a tile, the block that `key` is in.
  bool operator()(int64_t tile, int64_t b, int64_t kv, int64_t key) const {
    const int64_t group = g.heads / g.kv_heads, in_batch = allowed.batch ? b : 0;
    const int64_t first = allowed.head ? kv * group : 0, last = allowed.head ? first + group : 1;
    bool found = false;
    for (int64_t h = first; h < last; ++h) found |= some[((in_batch * heads + h) * count + tile) * blocks + key / BLOCK];
    return found;
  }
};

}  // namespace prescore
