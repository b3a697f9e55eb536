// Gradients of attend. A tile's rows meet the keys that they attend in blocks of 16, as in the forward; their logits, and
// the products of values with the gradient, stay in memory from one pass to the next: to the softmax's sums, to the slopes,
// to the gradients. Keys of a KV head are given theirs by tiles one after the other, in a few parts of all tiles, whose
// sums are added in order: threads never change a result.
//
// With P the weights, dP = dO V^T and dS = P * (dP - rowsum(P * dP)), as in reference.attend_backward.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"
#include "site.h"
#include "softmax.h"
#include "sources.h"

namespace prescore {

struct Backward {
  const Geometry& g;
  const Sources& from;
  View query, grad;
  const View *rest_key, *rest_value;  // a residual's centroids, one a cluster, [batch, KV head, cluster, feature]; or null
  const float* rest_bias;             // -inf: no key
  int64_t splits;                     // parts of the tiles
  float* d_query;                     // [batch, head, query, feature]
  float *d_key, *d_value;             // [split, batch, KV head, key, feature]
  float *d_row_key, *d_row_value;     // the same of rows
  float *d_rest_key, *d_rest_value;   // and of centroids
  float* d_sink;                      // [batch, head, query], null without a learned sink

  std::vector<Span> tiles = spans(g);
  int64_t group = g.heads / g.kv_heads, dim = whole(g.dim), width = whole(g.value_dim);
  int64_t chunks = (g.k_len + g.chunk - 1) / g.chunk, places = g.routes ? chunks * g.chunk : 0;
  int64_t clusters = places / g.cluster, per_segment = g.keep + g.centroids;
  int64_t rows_total = g.sinks + chunks * per_segment;

  struct Met {
    int32_t at[W];         // keys, then rows, from k_len on, then centroids; -1: none
    int64_t first, count;  // of those in `listed` that attend any
  };

  struct Scratch {
    std::vector<float> query, grad, d_query, top, total, inner;  // of a tile's rows
    std::vector<float> key, value, lines, sums;                  // of a block: [feature][16] twice, [16][feature] twice
    std::vector<Met> blocks;
    std::vector<int32_t> listed, start, cursor, routed;
    std::vector<float> weight, slope, bend;  // [listed][16]: logits, then weights; dP, then dS; of a softcap
    std::vector<uint16_t> seen, unread;
    std::vector<uint8_t> copied;
    int64_t b, kv, bh, split, rows, length;
  };
  Scratch scratch() const { return {}; }

  const float* line(Scratch& s, int32_t at, bool values, float* to) const {
    const int64_t features = values ? g.value_dim : g.dim, row = at - g.k_len, centroid = row - rows_total;
    if (at < 0)
      std::fill_n(to, features, 0.0f);
    else if (row < 0)
      read(values ? from.value : from.key, s.b, s.kv, at, features, to);
    else if (centroid < 0)
      read(values ? from.row_value : from.row_key, s.b, s.kv, row, features, to);
    else
      read(values ? *rest_value : *rest_key, s.b, s.kv, centroid, features, to);
    return to;
  }

  // Keys or values of a block, feature by feature.
  void across(Scratch& s, const int32_t* at, bool values, std::vector<float>& to) const {
    const int64_t features = values ? g.value_dim : g.dim;
    to.resize(features * W);
    s.sums.resize(std::max(dim, width));
    for (int j = 0; j < W; ++j) {
      const float* from_line = line(s, at[j], values, s.sums.data());
      for (int64_t d = 0; d < features; ++d) to[d * W + j] = from_line[d];
    }
  }

  // Rows [i] of a block, `count` of them, `row(i)`, attend the keys of `lanes(i)`; biases in powers of two, or null.
  template <typename Row, typename Lanes>
  void meet(Scratch& s, const int32_t (&at)[W], const float* bias, int64_t count, Row row, Lanes lanes) const {
    Met met;
    std::copy_n(at, W, met.at);
    met.first = s.listed.size();
    s.seen.clear();
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t seen = lanes(i);
      if (!seen) continue;
      s.listed.push_back(row(i));
      s.seen.push_back((uint16_t)seen);
    }
    met.count = s.listed.size() - met.first;
    if (!met.count) return;
    s.blocks.push_back(met);
    s.weight.resize(s.listed.size() * W);
    s.slope.resize(s.listed.size() * W);
    s.bend.resize(g.softcap > 0 ? s.listed.size() * W : 0);
    across(s, at, false, s.key);
    across(s, at, true, s.value);
    by_groups<LOGIT_ROWS>(met.count, Score{*this, s, met.first, bias});
  }

  struct Score {
    const Backward& of;
    Scratch& s;
    int64_t first;
    const float* bias;

    template <int N>
    void run(int64_t at) const {
      const int32_t* row = &s.listed[first + at];
      const float *q[N], *o[N];
      for (int i = 0; i < N; ++i) {
        q[i] = &s.query[row[i] * of.dim];
        o[i] = &s.grad[row[i] * of.width];
      }
      vec x[N][V], y[N][V];
      products<N, V>(q, of.g.dim, s.key.data(), x);
      const Softcap softcap(of.g.softcap);
      for (int i = 0; i < N; ++i) {
        float* to = &s.weight[(first + at + i) * W];
        vec most = splat(NEG_INF);
        for (int v = 0; v < V; ++v) {
          vec logit = x[i][v];
          if (softcap.most > 0.0f) {
            logit = softcap(logit);
            const vec share = logit / softcap.most;
            store(&s.bend[(first + at + i) * W + v * L], 1.0f - share * share);
          }
          if (bias) logit += load(bias + v * L);
          logit = choose(s.seen[at + i] >> v * L, logit, splat(NEG_INF));
          store(to + v * L, logit);
          most = larger(most, logit);
        }
        s.top[row[i]] = std::max(s.top[row[i]], max_lane(most));
      }
      products<N, V>(o, of.g.value_dim, s.value.data(), y);
      for (int i = 0; i < N; ++i)
        for (int v = 0; v < V; ++v) store(&s.slope[(first + at + i) * W + v * L], y[i][v]);
    }
  };

  void meet_window(Scratch& s, const Span& span) const {
    const Reach reach(g, from, span);
    for (int64_t base = reach.start; base < reach.stop; base += W) {
      int32_t at[W];
      uint32_t there = 0;
      for (int j = 0; j < W; ++j) {
        const int64_t n = base + j;
        at[j] = n < reach.stop && (!from.valid || from.valid[s.b * g.k_len + n]) ? (int32_t)n : -1;
        there |= (uint32_t)(at[j] >= 0) << j;
      }
      const bool all = reach.all_attend(base + W - 1);
      auto lanes = [&](int64_t r) { return all ? there : there & reach.lanes(r % s.length, base); };
      meet(s, at, nullptr, s.rows, [](int64_t r) { return (int32_t)r; }, lanes);
    }
  }

  void meet_rows(Scratch& s, const Span& span, int64_t first, int64_t count) const {
    const int32_t* index = from.row_index + s.bh * rows_total;
    const float* bias = from.row_bias + s.bh * rows_total;
    for (int64_t base = first; base < first + count; base += W) {
      int32_t at[W];
      alignas(64) float added[W];
      uint32_t there = 0;
      for (int j = 0; j < W; ++j) {
        const int64_t r = base + j;
        const bool is = r < first + count && bias[r] > NEG_INF && !(index[r] >= span.low && index[r] < span.high);
        at[j] = is ? (int32_t)(g.k_len + r) : -1;
        added[j] = is ? bias[r] * (float)LOG2_E : 0.0f;
        there |= (uint32_t)is << j;
        if (is && !s.copied.empty() && index[r] >= 0) s.copied[index[r]] = 1;
      }
      meet(s, at, added, s.rows, [](int64_t r) { return (int32_t)r; }, [&](int64_t) { return there; });
    }
  }

  // The centroids outside of the window, for each row those of the clusters that it did not route to.
  void meet_rest(Scratch& s, const Span& span) const {
    const int64_t per_chunk = g.chunk / g.cluster, low = span.low / g.chunk * per_chunk;
    const int64_t high = g.causal ? clusters : (span.high + g.chunk - 1) / g.chunk * per_chunk;
    const float* bias = rest_bias + s.bh * clusters;
    for (int64_t base = 0; base < clusters; base += W) {
      int32_t at[W];
      alignas(64) float added[W];
      uint32_t there = 0;
      for (int j = 0; j < W; ++j) {
        const int64_t c = base + j;
        const bool is = c < clusters && (c < low || c >= high) && bias[c] > NEG_INF;
        at[j] = is ? (int32_t)(g.k_len + rows_total + c) : -1;
        added[j] = is ? bias[c] * (float)LOG2_E : 0.0f;
        there |= (uint32_t)is << j;
      }
      s.unread.assign(s.rows, (uint16_t)there);
      for (int j = 0; j < W && base + j < clusters; ++j)
        for (int64_t i = s.start[base + j]; i < s.start[base + j + 1]; ++i) s.unread[s.routed[i]] &= (uint16_t)~(1u << j);
      meet(s, at, added, s.rows, [](int64_t r) { return (int32_t)r; }, [&](int64_t r) { return (uint32_t)s.unread[r]; });
    }
  }

  void meet_routes(Scratch& s, const Span& span) const {
    const Entries<const int32_t> routes_of = entries(from.routes, g, span, s.b, s.kv, g.routes);
    sort_by_cluster(routes_of, s.rows, clusters, s.start, s.cursor, s.routed);
    if (rest_key) meet_rest(s, span);
    for (int64_t c = 0; c < clusters; ++c) {
      const int64_t count = s.start[c + 1] - s.start[c];
      for (int64_t base = 0; count && base < g.cluster; base += W) {
        const int32_t* order = from.order + s.bh * places + c * g.cluster + base;
        int32_t at[W];
        uint32_t there = 0;
        for (int j = 0; j < W; ++j) {
          at[j] = order[j] >= 0 && (s.copied.empty() || !s.copied[order[j]]) ? order[j] : -1;
          there |= (uint32_t)(at[j] >= 0) << j;
        }
        meet(s, at, nullptr, count, [&](int64_t i) { return s.routed[s.start[c] + i]; }, [&](int64_t) { return there; });
      }
    }
  }

  // Logits as weights that are not normalized yet; the sums of each row's, and of those times dP.
  void weigh(Scratch& s) const {
    for (size_t i = 0; i < s.listed.size(); ++i) {
      const int32_t r = s.listed[i];
      const float top = s.top[r] > NEG_INF ? s.top[r] : 0.0f;
      vec total = {}, inner = {};
      for (int v = 0; v < V; ++v) {
        float* to = &s.weight[i * W + v * L];
        const vec logit = load(to), weight = logit == NEG_INF ? vec{} : exp2_vec(logit - top);
        store(to, weight);
        total += weight;
        inner += weight * load(&s.slope[i * W + v * L]);
      }
      s.total[r] += sum_lanes(total);
      s.inner[r] += sum_lanes(inner);
    }
  }

  // dP as dS, weights as shares of their sum.
  void slopes(Scratch& s) const {
    for (size_t i = 0; i < s.listed.size(); ++i) {
      const int32_t r = s.listed[i];
      for (int v = 0; v < V; ++v) {
        float *to_weight = &s.weight[i * W + v * L], *to_slope = &s.slope[i * W + v * L];
        const vec weight = load(to_weight) * s.total[r];
        vec slope = weight * (load(to_slope) - s.inner[r]);
        if (!s.bend.empty()) slope *= load(&s.bend[i * W + v * L]);
        store(to_weight, weight);
        store(to_slope, weight == 0.0f ? vec{} : slope);  // what is not attended may be no number
      }
    }
  }

  // To the gradients of N rows' queries, a block's.
  struct ToQueries {
    const Backward& of;
    Scratch& s;
    int64_t first;

    template <int N>
    void run(int64_t at) const {
      int64_t column = 0;
      for (; column + COLUMNS * L <= of.dim; column += COLUMNS * L) add<N, COLUMNS>(first + at, column);
      for (; column < of.dim; column += L) add<N, 1>(first + at, column);
    }

    template <int N, int C>
    void add(int64_t at, int64_t column) const {
      float* to[N];
      vec sum[N][C];
      for (int i = 0; i < N; ++i) {
        to[i] = &s.d_query[s.listed[at + i] * of.dim + column];
        for (int c = 0; c < C; ++c) sum[i][c] = load(to[i] + c * L);
      }
      for (int j = 0; j < W; ++j) {
        vec key[C];
        for (int c = 0; c < C; ++c) key[c] = load(&s.lines[j * of.dim + column + c * L]);
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) sum[i][c] += key[c] * s.slope[(at + i) * W + j];
      }
      for (int i = 0; i < N; ++i)
        for (int c = 0; c < C; ++c) store(to[i] + c * L, sum[i][c]);
    }
  };

  // To `sums` [16][size], of a block's rows: by [listed][16] times what they have in `rows` [row][size].
  template <int K, int C>
  static void collect(const float* by, const int32_t* row, int64_t count, const float* rows, int64_t size, int64_t j,
                      int64_t column, float* sums) {
    vec sum[K][C] = {};
    for (int64_t i = 0; i < count; ++i) {
      const float* from_row = rows + row[i] * size + column;
      vec x[C];
      for (int c = 0; c < C; ++c) x[c] = load(from_row + c * L);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sum[k][c] += x[c] * by[i * W + j + k];
    }
    for (int k = 0; k < K; ++k)
      for (int c = 0; c < C; ++c) store(sums + (j + k) * size + column + c * L, sum[k][c]);
  }

  static void collect_all(const float* by, const int32_t* row, int64_t count, const float* rows, int64_t size,
                          float* sums) {
    constexpr int KEYS = L == 4 ? 2 : 4;
    for (int64_t j = 0; j < W; j += KEYS) {
      int64_t column = 0;
      for (; column + 2 * L <= size; column += 2 * L) collect<KEYS, 2>(by, row, count, rows, size, j, column, sums);
      for (; column < size; column += L) collect<KEYS, 1>(by, row, count, rows, size, j, column, sums);
    }
  }

  void give(const Scratch& s, const int32_t* at, const float* sums, int64_t size, float times, int64_t features,
            float* keys, float* rows, float* rest) const {
    const int64_t head = s.split * g.batch * g.kv_heads + s.bh;
    for (int j = 0; j < W; ++j) {
      if (at[j] < 0) continue;
      const int64_t row = at[j] - g.k_len, centroid = row - rows_total;
      float* to = row < 0        ? keys + (head * g.k_len + at[j]) * features
                  : centroid < 0 ? rows + (head * rows_total + row) * features
                                 : rest + (head * clusters + centroid) * features;
      for (int64_t d = 0; d < features; ++d) to[d] += sums[j * size + d] * times;
    }
  }

  void run_tile(Scratch& s, const Span& span) const {
    s.length = span.end - span.begin;
    s.rows = s.length * group;
    s.query.assign(s.rows * dim, 0.0f);
    s.grad.assign(s.rows * width, 0.0f);
    s.d_query.assign(s.rows * dim, 0.0f);
    s.top.assign(s.rows, NEG_INF);
    s.total.assign(s.rows, 0.0f);
    s.inner.assign(s.rows, 0.0f);
    s.copied.assign(g.keep && g.routes ? g.k_len : 0, 0);
    s.blocks.clear();
    s.listed.clear();
    std::vector<float> sink(d_sink ? s.rows : 0);
    for (int64_t r = 0; r < s.rows; ++r) {
      const int64_t h = s.kv * group + r / s.length, n = span.begin + r % s.length;
      read(query, s.b, h, n, g.dim, &s.query[r * dim]);
      for (int64_t d = 0; d < g.dim; ++d) s.query[r * dim + d] *= (float)(g.scale * LOG2_E);
      read(grad, s.b, h, n, g.value_dim, &s.grad[r * width]);
      if (!d_sink) continue;
      read(*from.sink_logit, s.b, h, n, 1, &sink[r]);
      if (sink[r] != NEG_INF) sink[r] = power_of_two(sink[r]);
      s.top[r] = sink[r];
    }
    meet_window(s, span);
    if (span.finished) meet_rows(s, span, 0, g.sinks);
    for (int64_t f = per_segment ? span.finished : 0; f > 0; f -= f & -f)
      meet_rows(s, span, g.sinks + (f - 1) * per_segment, per_segment);
    if (g.routes) meet_routes(s, span);
    weigh(s);
    for (int64_t r = 0; r < s.rows; ++r) {
      const float own = d_sink && sink[r] > NEG_INF ? std::exp2(sink[r] - s.top[r]) : 0.0f, total = s.total[r] + own;
      s.total[r] = total > 0.0f ? 1.0f / total : 0.0f;
      s.inner[r] *= s.total[r];
      const int64_t place = (s.b * g.heads + s.kv * group + r / s.length) * g.q_len + span.begin + r % s.length;
      if (d_sink) d_sink[place] = -own * s.total[r] * s.inner[r];
    }
    slopes(s);
    s.lines.assign(W * dim, 0.0f);
    s.sums.resize(W * std::max(dim, width));
    for (const Met& met : s.blocks) {
      const int32_t* row = &s.listed[met.first];
      for (int j = 0; j < W; ++j) line(s, met.at[j], false, &s.lines[j * dim]);
      by_groups<VALUE_ROWS>(met.count, ToQueries{*this, s, met.first});
      collect_all(&s.slope[met.first * W], row, met.count, s.query.data(), dim, s.sums.data());
      give(s, met.at, s.sums.data(), dim, (float)(1 / LOG2_E), g.dim, d_key, d_row_key, d_rest_key);
      collect_all(&s.weight[met.first * W], row, met.count, s.grad.data(), width, s.sums.data());
      give(s, met.at, s.sums.data(), width, 1.0f, g.value_dim, d_value, d_row_value, d_rest_value);
    }
    for (int64_t r = 0; r < s.rows; ++r) {
      const int64_t h = s.kv * group + r / s.length, n = span.begin + r % s.length;
      float* to = d_query + ((s.b * g.heads + h) * g.q_len + n) * g.dim;
      for (int64_t d = 0; d < g.dim; ++d) to[d] = s.d_query[r * dim + d] * (float)g.scale;
    }
  }

  void run(int64_t task, Scratch& s) const {  // one task: one (batch, KV head, part of the tiles)
    s.bh = task / splits;
    s.split = task % splits;
    s.b = s.bh / g.kv_heads;
    s.kv = s.bh % g.kv_heads;
    for (size_t t = s.split; t < tiles.size(); t += splits) run_tile(s, tiles[t]);
  }
};

}  // namespace prescore
