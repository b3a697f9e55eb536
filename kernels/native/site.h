// What crosses the border from Python, where windows lie, and how tasks are shared by threads.

#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "half.h"
#include "simd.h"

extern "C" {

struct Geometry {
  int64_t batch, heads, kv_heads, q_len, k_len, dim, value_dim;
  int64_t chunk, cluster, window, causal, sinks, keep, centroids, routes, coarse, group_routes, residual, tile, threads;
  int64_t narrow;           // whether products are those of tiles of bfloat16; all views are bfloat16 then
  double scale, log_share;  // log_share: natural, -inf: none
  double spread_factor;     // of a cluster's variance, for each unit of ln(count)
  double softcap;           // c of c * tanh(logits / c); 0: none
};

struct View {  // a [batch, head, position, feature] tensor; features are contiguous
  void* data;
  int64_t batch, head, position;
  int64_t format;  // of prescore::Format
};

}  // extern "C"

namespace prescore {

enum Format : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

inline int64_t bytes_of(const View& v) { return v.format == FLOAT32 ? 4 : 2; }

inline float widen(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline uint16_t narrow(float x) {  // to nearest, ties to even, as torch rounds
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline int64_t offset(const View& v, int64_t b, int64_t h, int64_t n) {
  return b * v.batch + h * v.head + n * v.position;
}

// Whole vectors, then what is left.
template <typename Vectors, typename Single>
inline void each(int64_t count, Vectors vectors, Single single) {
  int64_t d = 0;
  for (; d + L <= count; d += L) vectors(d);
  for (; d < count; ++d) single(d);
}

// One position's features as float32.
inline void read(const View& v, int64_t b, int64_t h, int64_t n, int64_t dim, float* to) {
  const uint16_t* from = (const uint16_t*)v.data + offset(v, b, h, n);
  if (v.format == BFLOAT16)
    each(dim, [&](int64_t d) { store(to + d, load_narrow(from + d)); }, [&](int64_t d) { to[d] = widen(from[d]); });
  else if (v.format == FLOAT16)
    each(dim, [&](int64_t d) { store(to + d, load_half(from + d)); }, [&](int64_t d) { to[d] = widen_half(from[d]); });
  else
    std::memcpy(to, (const float*)v.data + offset(v, b, h, n), dim * sizeof(float));
}

inline void write(const View& v, int64_t b, int64_t h, int64_t n, int64_t dim, const float* from) {
  uint16_t* to = (uint16_t*)v.data + offset(v, b, h, n);
  if (v.format == BFLOAT16)
    each(dim, [&](int64_t d) { store_narrow(to + d, load(from + d)); }, [&](int64_t d) { to[d] = narrow(from[d]); });
  else if (v.format == FLOAT16)
    each(dim, [&](int64_t d) { store_half(to + d, load(from + d)); }, [&](int64_t d) { to[d] = narrow_half(from[d]); });
  else
    std::memcpy((float*)v.data + offset(v, b, h, n), from, dim * sizeof(float));
}

// How OpenMP runs a function by a team: torch's own threads, which wait for more work awake for a while, so that others
// would have no core to run on. Null: torch has none here.
typedef void (*Team)(void (*)(void*), void*, unsigned, unsigned);
inline Team team() {
  static const Team found = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

// The tasks [first, last), each by whichever thread is free; a thread has one scratch for all its tasks.
template <typename Work>
void parallel(int64_t first, int64_t last, int64_t threads, Work& work) {
  std::atomic<int64_t> next{first};
  auto loop = [&] {
    auto scratch = work.scratch();
    for (int64_t task; (task = next.fetch_add(1)) < last;) work.run(task, scratch);
  };
  if (threads < 2 || last - first < 2) return loop();
  // As many as ever, though tasks may be fewer: a team that shrinks ends its threads.
  if (team()) return team()([](void* run) { (*static_cast<decltype(loop)*>(run))(); }, &loop, (unsigned)threads, 0);
  std::vector<std::thread> pool;
  try {
    for (int64_t t = 1; t < std::min(threads, last - first); ++t) pool.emplace_back(loop);
  } catch (const std::system_error&) {  // no more to be had: those that are there do it
  }
  loop();
  for (auto& thread : pool) thread.join();
}

struct Span {
  int64_t begin, end, low, high, finished;
};

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// What a tile's rows have, `width` values a row. Row r is query r % length of query head r / length of the KV head.
template <typename T>
struct Entries {
  T* data;
  int64_t length, per_head, width;
  T* operator()(int64_t r) const { return data + (r / length * per_head + r % length) * width; }
};

// A tile's part of a tensor [batch, head, query, width], or null.
template <typename T>
Entries<T> entries(T* all, const Geometry& g, const Span& span, int64_t b, int64_t kv, int64_t width) {
  const int64_t first = (b * g.heads + kv * (g.heads / g.kv_heads)) * g.q_len + span.begin;
  return {all ? all + first * width : nullptr, span.end - span.begin, g.q_len, width};
}

// The rows that route to each cluster, a counting sort: those of cluster c are listed from start[c] to start[c + 1].
inline void sort_by_cluster(const Entries<const int32_t>& routes_of, int64_t rows, int64_t clusters,
                            std::vector<int32_t>& start, std::vector<int32_t>& cursor, std::vector<int32_t>& listed) {
  auto each_route = [&](auto take) {
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t* route = routes_of(r);
      for (int64_t i = 0; i < routes_of.width && route[i] >= 0; ++i) take(route[i], (int32_t)r);
    }
  };
  start.assign(clusters + 1, 0);
  each_route([&](int32_t c, int32_t) { ++start[c + 1]; });
  for (int64_t c = 0; c < clusters; ++c) start[c + 1] += start[c];
  cursor.assign(start.begin(), start.end());
  listed.resize(std::max<int64_t>(rows, start[clusters]));
  each_route([&](int32_t c, int32_t r) { listed[cursor[c]++] = r; });
}

// Mirrors layout.spans.
inline std::vector<Span> spans(const Geometry& g) {
  std::vector<Span> found;
  const int64_t shift = g.causal ? g.k_len - g.q_len : 0;
  const int64_t total = (g.k_len + g.chunk - 1) / g.chunk;
  for (int64_t begin = 0; begin < g.q_len;) {
    Span s{begin, std::min(begin + g.tile, g.q_len), 0, g.k_len, 0};
    const int64_t pos = begin + shift;
    if (g.window < 0) {
      // no limit: the whole sequence
    } else if (g.causal) {
      const int64_t first = floor_div(pos - g.window, g.chunk);
      s.end = std::min(s.end, (first + 1) * g.chunk + g.window - shift);
      s.low = std::max<int64_t>(0, first) * g.chunk;
      s.finished = s.low / g.chunk;
    } else if (g.window == 0) {
      s.high = 0;
      s.finished = total;
    } else {
      const int64_t first = floor_div(pos - g.window, g.chunk), last = floor_div(pos + g.window, g.chunk);
      s.end = std::min({s.end, (first + 1) * g.chunk + g.window, (last + 1) * g.chunk - g.window});
      s.low = std::max<int64_t>(0, first) * g.chunk;
      s.high = std::min((last + 1) * g.chunk, g.k_len);
      s.finished = total;
    }
    found.push_back(s);
    begin = s.end;
  }
  return found;
}

}  // namespace prescore
