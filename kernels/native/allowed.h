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
  std::atomic<bool> hides{true};  // no other number is there, and each query has a key

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
    if (other || bits(others) || !(some || bits(zeros))) hides = false;
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
  const Geometry& g;
  const Allowed& allowed;
  const std::vector<Span>& tiles;
  int64_t batch = allowed.data ? (allowed.batch ? g.batch : 1) : 0, heads = allowed.head ? g.heads : 1;
  std::vector<Extent> found = std::vector<Extent>(batch * heads * tiles.size());

  struct Nothing {};
  Nothing scratch() const { return {}; }

  void run(int64_t task, Nothing&) {
    const int64_t count = tiles.size(), b = task / count / heads, h = task / count % heads;
    Extent seen{g.k_len, 0};
    for (int64_t q = tiles[task % count].begin; q < tiles[task % count].end; ++q) {
      const uint8_t* row = allowed.data + b * allowed.batch + h * allowed.head + q * allowed.query;
      int64_t first = 0, end = g.k_len;
      while (first + 8 <= seen.first && !eight(row + first)) first += 8;
      while (first < seen.first && !row[first]) ++first;
      while (end - 8 >= seen.end && !eight(row + end - 8)) end -= 8;
      while (end > seen.end && !row[end - 1]) --end;
      seen.widen({std::min(first, seen.first), std::max(end, seen.end)});
      if (!allowed.query) break;
    }
    found[task] = seen;
  }

  void find() { parallel(0, (int64_t)found.size(), g.threads, *this); }

  // The share of a tile's blocks of 64 keys in which any of its queries may attend a key, of all tiles.
  double share() const {
    constexpr int64_t BLOCK = 64;
    const int64_t blocks = (g.k_len + BLOCK - 1) / BLOCK;
    int64_t some = 0;
    for (int64_t task = 0; task < (int64_t)found.size(); ++task)
      for (int64_t from = found[task].first / BLOCK * BLOCK; from < found[task].end; from += BLOCK)
        some += any(task, from, std::min(from + BLOCK, g.k_len));
    return (double)some / (double)std::max<int64_t>((int64_t)found.size() * blocks, 1);
  }

  bool any(int64_t task, int64_t from, int64_t end) const {
    const int64_t count = tiles.size(), b = task / count / heads, h = task / count % heads;
    for (int64_t q = tiles[task % count].begin; q < tiles[task % count].end; ++q) {
      const uint8_t* row = allowed.data + b * allowed.batch + h * allowed.head + q * allowed.query;
      int64_t at = from;
      for (; at + 8 <= end; at += 8)
        if (eight(row + at)) return true;
      for (; at < end; ++at)
        if (row[at]) return true;
    }
    return false;
  }

  // Of one tile of a KV head's query heads.
  Extent of(int64_t tile, int64_t b, int64_t kv) const {
    const int64_t group = g.heads / g.kv_heads, count = tiles.size(), in_batch = allowed.batch ? b : 0;
    if (!allowed.head) return found[in_batch * count + tile];
    Extent seen{g.k_len, 0};
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) seen.widen(found[(in_batch * heads + h) * count + tile]);
    return seen;
  }
};

}  // namespace prescore
