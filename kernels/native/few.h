// Attention of few queries, as where a sequence is continued: each key is read once, where it lies, by all the rows of
// its KV head. Reading is what takes the time, so nothing is packed, and what a mask hides is not read.

#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "allowed.h"
#include "simd.h"
#include "site.h"

namespace prescore {

// Of each of L vectors the sum of its lanes.
inline vec sums_of(const vec (&x)[L]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  auto two = [&](int i) { return _mm256_hadd_ps((__m256)x[i], (__m256)x[i + 1]); };
  const __m256 low = _mm256_hadd_ps(two(0), two(2)), high = _mm256_hadd_ps(two(4), two(6));
  return (vec)_mm256_permute2f128_ps(low, high, 0x20) + (vec)_mm256_permute2f128_ps(low, high, 0x31);
#else
  vec sums = {};
  for (int i = 0; i < L; ++i) sums[i] = sum_lanes(x[i]);
  return sums;
#endif
}

struct Few {
  const Geometry& g;
  View query, key, value, out;
  Allowed allowed;         // data null: every key
  const View* numbers;     // [batch, head, query, key], which logits are added to, or null
  const View* sink_logit;  // [batch, head, query, 1] or null

  static constexpr int64_t TASKS = 64;        // that there are at least, where there are as many keys
  static constexpr int64_t LEFT = 1 << 22;    // numbers that parts leave at most, with more tasks than those
  static constexpr int64_t BLOCK = 32;        // keys at once
  static constexpr int64_t BYTES = 1 << 18;   // of keys and values; fewer are not worth several threads
  static constexpr int64_t JOINED = 1 << 16;  // numbers that parts leave; fewer are not, either
  static constexpr int COLUMNS = 8;           // vectors of a row's sums in registers

  int64_t group = g.heads / g.kv_heads, rows = group * g.q_len;
  int64_t dim = whole(g.dim), width = whole(g.value_dim);
  // What a part leaves of a row: the highest logit, the sum of the weights, and that of the values.
  int64_t size = 2 + width;
  int64_t part_keys = keys_of_a_part(), parts = parts_of(part_keys);
  std::unique_ptr<float[]> left{new float[g.batch * g.kv_heads * parts * rows * size]};

  // Not by the threads, on which no result shall depend.
  int64_t keys_of_a_part() const {
    const int64_t heads = g.batch * g.kv_heads;
    int64_t keys = 1024;
    while (keys < g.k_len && heads * parts_of(keys) > TASKS && heads * parts_of(keys) * rows * size > LEFT) keys *= 2;
    return keys;
  }
  int64_t parts_of(int64_t keys) const { return (g.k_len + keys - 1) / keys; }

  struct Scratch {
    std::vector<float> query, key, value, numbers;
    std::vector<uint32_t> seen;
    alignas(64) float logit[BLOCK];
  };
  Scratch scratch() const { return {}; }

  struct Lines {  // a block's keys or values, as float32, in whole vectors
    const float* data;
    int64_t step;
    const float* operator()(int64_t j) const { return data + j * step; }
  };

  Lines lines(const View& from, int64_t b, int64_t kv, int64_t base, int64_t count, int64_t features,
              std::vector<float>& copy) const {
    if (from.format == FLOAT32 && features % L == 0) return {(const float*)from.data + offset(from, b, kv, base), from.position};
    const int64_t step = whole(features);
    copy.resize(BLOCK * step);  // zeros beyond the features
    for (int64_t j = 0; j < count; ++j) read(from, b, kv, base + j, features, &copy[j * step]);
    return {copy.data(), step};
  }

  // Which of a block's keys each row may attend; whether there are any.
  bool see(Scratch& s, int64_t b, int64_t kv, int64_t base, int64_t count) const {
    const uint32_t every = count < BLOCK ? (1u << count) - 1 : ~0u;
    uint32_t any = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = kv * group + r / g.q_len, n = r % g.q_len;
      uint32_t seen = every;
      if (allowed.data) {
        const uint8_t* from = allowed.data + b * allowed.batch + h * allowed.head + n * allowed.query + base;
        seen = bits_of(from, std::min<int64_t>(count, 16));
        if (count > 16) seen |= bits_of(from + 16, count - 16) << 16;
      }
      s.seen[r] = seen;
      any |= seen;
    }
    return any != 0;
  }

  // A row's logits of a block, -inf: not attended; the highest of them.
  float score(Scratch& s, const Lines& keys, const float* q, uint32_t seen, const float* added, int64_t count) const {
    float most = NEG_INF;
    for (int64_t j = 0; j < count; j += L) {
      const float* line[L];
      for (int i = 0; i < L; ++i) line[i] = keys(std::min(j + i, count - 1));
      vec sum[L] = {};
      for (int64_t d = 0; d < dim; d += L) {
        const vec x = load(q + d);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) sum[i] += x * load(line[i] + d);
      }
      vec logit = sums_of(sum);
      if (g.softcap > 0) logit = tanh_vec(logit / (float)g.softcap) * (float)g.softcap;
      if (added) logit += load(added + j);
      logit = choose(seen >> j, logit, splat(NEG_INF));
      store(s.logit + j, logit);
      most = std::max(most, max_lane(logit));
    }
    return most;
  }

  static float weight_of(float lower, float most) { return std::exp2((lower - most) * (float)LOG2_E); }

  // Logits as weights; their sum.
  static float weigh(float* logit, int64_t count, float top) {
    vec total = {};
    for (int64_t j = 0; j < count; j += L) {
      const vec x = load(logit + j), weight = exp2_vec((x - top) * (float)LOG2_E);
      const vec kept = x == NEG_INF ? vec{} : weight;  // a NaN stays
      store(logit + j, kept);
      total += kept;
    }
    return sum_lanes(total);
  }

  // To a row's sums, those of a block. A value without a weight is not read: it may be no number.
  template <int C>
  static void add(const Lines& values, const float* weight, uint32_t seen, int64_t column, float* to) {
    vec sum[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[c] = load(to + c * L);
    for (; seen; seen &= seen - 1) {
      const int j = __builtin_ctz(seen);
      const float* line = values(j) + column;
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[c] += load(line + c * L) * weight[j];
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(to + c * L, sum[c]);
  }

  void run(int64_t task, Scratch& s) {  // one task: one (batch, KV head, part)
    const int64_t bh = task / parts, b = bh / g.kv_heads, kv = bh % g.kv_heads, start = task % parts * part_keys;
    const int64_t stop = std::min(start + part_keys, g.k_len);
    s.query.assign(rows * dim, 0.0f);
    s.seen.resize(rows);
    s.numbers.resize(BLOCK);
    float* found = &left[task * rows * size];
    for (int64_t r = 0; r < rows; ++r) {
      float* q = &s.query[r * dim];
      read(query, b, kv * group + r / g.q_len, r % g.q_len, g.dim, q);
      for (int64_t d = 0; d < g.dim; ++d) q[d] *= (float)g.scale;
      std::fill_n(found + r * size, size, 0.0f);
      found[r * size] = NEG_INF;
    }
    for (int64_t base = start; base < stop; base += BLOCK) {
      const int64_t count = std::min(stop - base, BLOCK);
      if (!see(s, b, kv, base, count)) continue;
      const Lines keys = lines(key, b, kv, base, count, g.dim, s.key);
      const Lines values = lines(value, b, kv, base, count, g.value_dim, s.value);
      for (int64_t r = 0; r < rows; ++r)
        if (s.seen[r]) attend(s, keys, values, b, kv * group + r / g.q_len, r, base, count, found + r * size);
    }
  }

  void attend(Scratch& s, const Lines& keys, const Lines& values, int64_t b, int64_t h, int64_t r, int64_t base,
              int64_t count, float* found) const {
    const float* added = nullptr;
    if (numbers) {
      View from = *numbers;
      from.data = (char*)from.data + base * bytes_of(from);
      read(from, b, h, r % g.q_len, count, s.numbers.data());
      added = s.numbers.data();
    }
    float &top = found[0], &total = found[1], *sums = found + 2;
    const float most = score(s, keys, &s.query[r * dim], s.seen[r], added, count);
    if (most > top) {
      if (top > NEG_INF) {
        const float shrink = weight_of(top, most);
        total *= shrink;
        for (int64_t c = 0; c < width; c += L) store(sums + c, load(sums + c) * shrink);
      }
      top = most;
    }
    total += weigh(s.logit, count, top > NEG_INF ? top : 0.0f);
    int64_t c = 0;
    for (; c + COLUMNS * L <= width; c += COLUMNS * L) add<COLUMNS>(values, s.logit, s.seen[r], c, sums + c);
    for (; c + 4 * L <= width; c += 4 * L) add<4>(values, s.logit, s.seen[r], c, sums + c);
    for (; c < width; c += L) add<1>(values, s.logit, s.seen[r], c, sums + c);
  }

  // The parts of a row as one, in their order.
  void join(int64_t bh, int64_t r, float* sums) const {
    const int64_t b = bh / g.kv_heads, h = bh % g.kv_heads * group + r / g.q_len, n = r % g.q_len;
    auto part = [&](int64_t p) { return &left[((bh * parts + p) * rows + r) * size]; };
    float sink = NEG_INF, top = NEG_INF;
    if (sink_logit) read(*sink_logit, b, h, n, 1, &sink);
    const float highest = std::numeric_limits<float>::max();
    if (sink != NEG_INF) top = std::min(std::max(sink, -highest), highest);
    float total = sink == NEG_INF ? 0.0f : 0.0f * sink;  // one that is inf or NaN makes the sum NaN
    const float own = top;
    for (int64_t p = 0; p < parts; ++p) top = std::max(top, part(p)[0]);
    if (sink != NEG_INF) total += weight_of(own, top);
    std::fill_n(sums, width, 0.0f);
    for (int64_t p = 0; p < parts; ++p) {
      const float* from = part(p);
      const float share = from[0] > NEG_INF ? weight_of(from[0], top) : 1.0f;  // 1: of nothing, or of NaN
      total += from[1] * share;
      for (int64_t c = 0; c < width; c += L) store(sums + c, load(sums + c) + load(from + 2 + c) * share);
    }
    for (int64_t c = 0; c < g.value_dim; ++c) sums[c] = total == 0.0f ? 0.0f : sums[c] / total;
    write(out, b, h, n, g.value_dim, sums);
  }

  void run_all() {
    const int64_t heads = g.batch * g.kv_heads;
    const bool little = heads * g.k_len * (g.dim + g.value_dim) * bytes_of(key) < BYTES;
    parallel(0, heads * parts, little ? 1 : g.threads, *this);
    Join join{*this};
    parallel(0, heads * rows, heads * parts * rows * size < JOINED ? 1 : g.threads, join);
  }

  struct Join {
    const Few& few;
    std::vector<float> scratch() const { return std::vector<float>(few.width); }
    void run(int64_t task, std::vector<float>& sums) const { few.join(task / few.rows, task % few.rows, sums.data()); }
  };
};

}  // namespace prescore
