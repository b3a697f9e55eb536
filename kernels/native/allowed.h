// A mask that is in memory: which keys each query may attend.

#pragma once

#include <algorithm>
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

struct Extent {  // keys from `first` to before `end`, that any of some queries may attend
  int64_t first, end;

  void widen(Extent other) {
    first = std::min(first, other.first);
    end = std::max(end, other.end);
  }
};

// Where each tile of queries finds its keys, so that a mask is not read again and again where it forbids all.
struct Extents {
  static constexpr int64_t BLOCK = 64;  // keys
  const Geometry& g;
  const Allowed& allowed;
  const std::vector<Span>& tiles;
  int64_t batch = allowed.data ? (allowed.batch ? g.batch : 1) : 0, heads = allowed.head ? g.heads : 1;
  int64_t count = tiles.size(), blocks = (g.k_len + BLOCK - 1) / BLOCK;
  std::vector<Extent> found = std::vector<Extent>(batch * heads * count);
  std::vector<uint8_t> some = std::vector<uint8_t>(batch * heads * count * blocks);  // whether any key of a block is

  struct Nothing {};
  Nothing scratch() const { return {}; }

  const uint8_t* row(int64_t task, int64_t q) const {
    const int64_t b = task / count / heads, h = task / count % heads;
    return allowed.data + b * allowed.batch + h * allowed.head + q * allowed.query;
  }

  void run(int64_t task, Nothing&) {
    const Span& tile = tiles[task % count];
    Extent seen{g.k_len, 0};
    for (int64_t q = tile.begin; q < (allowed.query ? tile.end : tile.begin + 1); ++q) {
      const uint8_t* bytes = row(task, q);
      int64_t first = 0, end = g.k_len;
      while (first + 8 <= seen.first && !eight(bytes + first)) first += 8;
      while (first < seen.first && !bytes[first]) ++first;
      while (end - 8 >= seen.end && !eight(bytes + end - 8)) end -= 8;
      while (end > seen.end && !bytes[end - 1]) --end;
      seen.widen({std::min(first, seen.first), std::max(end, seen.end)});
    }
    found[task] = seen;
    for (int64_t block = seen.first / BLOCK; block * BLOCK < seen.end; ++block)
      some[task * blocks + block] = any(task, block * BLOCK, std::min((block + 1) * BLOCK, g.k_len));
  }

  bool any(int64_t task, int64_t from, int64_t end) const {
    for (int64_t q = tiles[task % count].begin; q < tiles[task % count].end; ++q) {
      const uint8_t* bytes = row(task, q);
      int64_t at = from;
      for (; at + 8 <= end; at += 8)
        if (eight(bytes + at)) return true;
      for (; at < end; ++at)
        if (bytes[at]) return true;
    }
    return false;
  }

  void find() { parallel(0, (int64_t)found.size(), g.threads, *this); }

  // The share of blocks, of all tiles, in which any query may attend a key.
  double share() const {
    int64_t total = 0;
    for (const uint8_t one : some) total += one;
    return (double)total / (double)std::max<int64_t>(some.size(), 1);
  }

  // Of one tile of a KV head's query heads: `widen` is called with what is found of each that has a mask of its own.
  template <typename Widen>
  void each(int64_t tile, int64_t b, int64_t kv, Widen widen) const {
    const int64_t group = g.heads / g.kv_heads, in_batch = allowed.batch ? b : 0;
    const int64_t first = allowed.head ? kv * group : 0, last = allowed.head ? first + group : 1;
    for (int64_t h = first; h < last; ++h) widen((in_batch * heads + h) * count + tile);
  }

  Extent of(int64_t tile, int64_t b, int64_t kv) const {
    Extent seen{g.k_len, 0};
    each(tile, b, kv, [&](int64_t task) { seen.widen(found[task]); });
    return {seen.first / BLOCK * BLOCK, seen.end};
  }

  // Whether any of the keys around `key` is allowed.
  bool near(int64_t tile, int64_t b, int64_t kv, int64_t key) const {
    bool any = false;
    each(tile, b, kv, [&](int64_t task) { any |= some[task * blocks + key / BLOCK]; });
    return any;
  }
};

}  // namespace prescore
