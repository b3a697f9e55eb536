// Clustering: the compiled form of kernels/clusterings/pca_tree.py and of what stands for a cluster.

#pragma once

#include "simd.h"
#include "site.h"

namespace prescore {

// Balanced clusters of one chunk by a tree of median cuts; see kernels/clusterings/pca_tree.py. A task is one
// (batch, KV head, chunk).
struct Cluster {
  const Geometry& g;
  View key, value;
  const uint8_t* member;  // [batch, KV head, place]
  int32_t* order;
  float *mean, *spread, *bias;
  int64_t width = whole(g.dim);
  int64_t chunks = (g.k_len + g.chunk - 1) / g.chunk;

  struct Scratch {
    std::vector<float> point, centred, mean, direction, next, along, value;
    std::vector<int32_t> at;
  };
  Scratch scratch() const {
    Scratch s;
    s.point.resize(g.chunk * width);
    s.centred.resize(g.chunk * width);
    for (auto* v : {&s.mean, &s.direction, &s.next}) v->resize(width);
    s.along.resize(g.chunk);
    s.value.resize(whole(g.value_dim));
    s.at.resize(g.chunk);
    return s;
  }

  float dot(const float* a, const float* b) const {
    vec total = {};
    for (int64_t d = 0; d < width; d += L) total += load(a + d) * load(b + d);
    return sum_lanes(total);
  }
  void add(float* to, const float* from, float times) const {
    for (int64_t d = 0; d < width; d += L) store(to + d, load(to + d) + load(from + d) * times);
  }
  void normalize(std::vector<float>& x) const {
    const float length = std::max(std::sqrt(dot(x.data(), x.data())), 1e-12f);
    for (float& v : x) v /= length;
  }
  // Mean over the members among places [first, last) of s.at; returns their number.
  int64_t mean_of(Scratch& s, int64_t first, int64_t last, const uint8_t* in, float* to) const {
    int64_t count = 0;
    std::fill(to, to + width, 0.0f);
    for (int64_t i = first; i < last; ++i)
      if (in[s.at[i]]) {
        add(to, &s.point[s.at[i] * width], 1.0f);
        ++count;
      }
    for (int64_t d = 0; d < width; ++d) to[d] /= (float)std::max<int64_t>(count, 1);
    return count;
  }

  // to = sum over the rows of (row . by) row, `by` and the sum in registers where they fit.
  void multiply(const float* row, int64_t count, const float* by, float* to) const {
    switch (width / L) {
      case 1: return multiply<1>(row, count, by, to);
      case 2: return multiply<2>(row, count, by, to);
      case 3: return multiply<3>(row, count, by, to);
      case 4: return multiply<4>(row, count, by, to);
      case 5: return multiply<5>(row, count, by, to);
      case 6: return multiply<6>(row, count, by, to);
      case 8: return multiply<8>(row, count, by, to);
    }
    std::fill(to, to + width, 0.0f);
    for (int64_t i = 0; i < count; ++i, row += width) add(to, row, dot(row, by));
  }

  template <int C>
  void multiply(const float* row, int64_t count, const float* by, float* to) const {
    vec factor[C], sum[C] = {};
    for (int c = 0; c < C; ++c) factor[c] = load(by + c * L);
    for (int64_t i = 0; i < count; ++i, row += C * L) {
      vec x[C], along = {};
      for (int c = 0; c < C; ++c) along += (x[c] = load(row + c * L)) * factor[c];
      const float times = sum_lanes(along);
      for (int c = 0; c < C; ++c) sum[c] += x[c] * times;
    }
    for (int c = 0; c < C; ++c) store(to + c * L, sum[c]);
  }

  void split(Scratch& s, int64_t first, int64_t last, const uint8_t* in) const {
    mean_of(s, first, last, in, s.mean.data());
    int64_t farthest = first;
    float most = -1.0f;
    for (int64_t i = first; i < last; ++i) {
      float* c = &s.centred[i * width];
      if (in[s.at[i]]) {
        std::memcpy(c, &s.point[s.at[i] * width], width * sizeof(float));
        add(c, s.mean.data(), -1.0f);
      } else {
        std::fill(c, c + width, 0.0f);
      }
      const float norm = dot(c, c);
      if (norm > most) {
        most = norm;
        farthest = i;
      }
    }
    std::copy_n(&s.centred[farthest * width], width, s.direction.data());
    for (int step = 0; step < POWER_ITERATIONS; ++step) {
      normalize(s.direction);
      multiply(&s.centred[first * width], last - first, s.direction.data(), s.next.data());
      std::swap(s.direction, s.next);
    }
    normalize(s.direction);
    for (int64_t i = first; i < last; ++i)
      s.along[s.at[i]] = in[s.at[i]] ? dot(&s.centred[i * width], s.direction.data())
                                     : std::numeric_limits<float>::infinity();
    // As torch sorts: NaN last, ties as they stand.
    std::stable_sort(s.at.begin() + first, s.at.begin() + last, [&](int32_t a, int32_t b) {
      const float x = s.along[a], y = s.along[b];
      return y != y ? x == x : x < y;
    });
  }

  static constexpr int POWER_ITERATIONS = 6;

  void run(int64_t task, Scratch& s) const {
    const int64_t bh = task / chunks, chunk = task % chunks, b = bh / g.kv_heads, kv = bh % g.kv_heads;
    const int64_t begin = chunk * g.chunk, per_chunk = g.chunk / g.cluster;
    const uint8_t* in = member + bh * chunks * g.chunk + begin;
    std::fill(s.point.begin(), s.point.end(), 0.0f);
    for (int64_t i = 0; i < g.chunk; ++i) {
      s.at[i] = (int32_t)i;
      if (in[i]) read(key, b, kv, begin + i, g.dim, &s.point[i * width]);
    }
    for (int64_t part = g.chunk; part > g.cluster; part /= 2)
      for (int64_t first = 0; first < g.chunk; first += part) split(s, first, first + part, in);
    for (int64_t c = 0; c < per_chunk; ++c) {
      const int64_t first = c * g.cluster, last = first + g.cluster, to = bh * chunks * per_chunk + chunk * per_chunk + c;
      const int64_t count = mean_of(s, first, last, in, s.mean.data());
      const float widen = (float)g.spread_factor * std::log((float)std::max<int64_t>(count, 1)) / (float)std::max<int64_t>(count, 1);
      vec taint = {};
      std::fill(s.next.begin(), s.next.end(), 0.0f);
      for (int64_t i = first; i < last; ++i) {
        const int64_t n = begin + s.at[i];
        order[bh * chunks * g.chunk + begin + i] = in[s.at[i]] ? (int32_t)n : -1;
        if (!in[s.at[i]]) continue;
        const float* p = &s.point[s.at[i] * width];
        read(value, b, kv, n, g.value_dim, s.value.data());
        for (int64_t d = 0; d < width; d += L) {
          const vec off = load(p + d) - load(&s.mean[d]);
          store(&s.next[d], load(&s.next[d]) + off * off);
          taint += load(p + d) * 0.0f;
        }
        for (int64_t d = 0; d < (int64_t)s.value.size(); d += L) taint += load(&s.value[d]) * 0.0f;
      }
      for (int64_t d = 0; d < g.dim; ++d) {
        mean[to * g.dim + d] = s.mean[d];
        spread[to * g.dim + d] = s.next[d] * widen;
      }
      bias[to] = count ? sum_lanes(taint) : NEG_INF;
    }
  }
};

}  // namespace prescore
