// The CPU lowering of clustering, `route` and `attend`; kernels/reference.py says what they compute.
//
// attend works tile by tile: `tile` consecutive queries times the query heads of one KV head are
// the rows of a tile. Keys come in blocks of 16, stored [dim][16], so that one vector holds one
// feature of 16 keys. Every source is a list of (row, 16-bit lane mask) against a block: the window
// and the rows take all the tile's rows; a routed cluster takes those that routed to it (a counting
// sort of the tile's routes), so its keys are loaded once for all of them. A tile of one query is
// the query-major order, a large tile the cluster-major one.
//
// Plain GCC/Clang vector extensions, no intrinsics: the same source runs on AVX-512, AVX2 and NEON.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

namespace {

constexpr int W = 16;
typedef float vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * W), aligned(4), may_alias));

constexpr float NEG_INF = -std::numeric_limits<float>::infinity();
// A running maximum is raised only when a logit passes it by this much: weights stay below e^8.
constexpr float SLACK = 8.0f;

inline vec splat(float x) { return vec{} + x; }
inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<vec*>(p) = x; }

inline float max_lane(vec x) {
  float best = x[0];
  for (int i = 1; i < W; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

inline float sum_lanes(vec x) {
  float total = 0;
  for (int i = 0; i < W; ++i) total += x[i];
  return total;
}

// exp(x) for x <= SLACK or so; a NaN stays a NaN. Cody-Waite reduction, degree-6 Taylor-like
// polynomial (Cephes expf coefficients), about 2 ulp.
inline vec exp_vec(vec x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  const vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vec n = x * 1.44269504088896341f + shift;
  const ivec whole = (ivec)n - (ivec)shift;
  const vec nf = n - shift;
  vec r = x - nf * 0.693359375f;
  r = r - nf * -2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return x == x ? (vec)((ivec)p + (whole << 23)) : x;
}

const ivec LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline ivec lanes_of(uint32_t mask) { return (((ivec{} + (int32_t)mask) >> LANES) & 1) != 0; }

// One block of 16 keys: keys [dim][16], values `value_stride` floats a key, finite unless said.
struct Block {
  const float* key;
  const float* value;
  int64_t value_stride;
  const float* bias;  // 16 logit biases, or null
  bool finite;
};

// The running softmax of a tile's rows.
struct Rows {
  int64_t dim, width;  // width: value dim rounded up to 16
  std::vector<float> query, top, total, out;

  void reset(int64_t rows, int64_t dim_, int64_t width_) {
    dim = dim_;
    width = width_;
    query.resize(rows * dim);
    top.assign(rows, NEG_INF);
    total.assign(rows * W, 0.0f);
    out.assign(rows * width, 0.0f);
  }
};

template <int N>
inline void logits(const Rows& rows, const int32_t* row, const float* key, vec* s) {
  const float* q[N];
  for (int i = 0; i < N; ++i) {
    q[i] = &rows.query[row[i] * rows.dim];
    s[i] = vec{};
  }
  for (int64_t d = 0; d < rows.dim; ++d) {
    const vec k = load(key + d * W);
    for (int i = 0; i < N; ++i) s[i] += k * q[i][d];
  }
}

template <int N, int C>
inline void weigh(Rows& rows, const int32_t* row, const vec* p, const Block& b, int64_t column) {
  vec acc[N][C];
  for (int i = 0; i < N; ++i)
    for (int c = 0; c < C; ++c) acc[i][c] = load(&rows.out[row[i] * rows.width + column + c * W]);
  for (int j = 0; j < W; ++j) {
    vec v[C];
    for (int c = 0; c < C; ++c) v[c] = load(b.value + j * b.value_stride + column + c * W);
    for (int i = 0; i < N; ++i) {
      const float w = reinterpret_cast<const float*>(&p[i])[j];
      for (int c = 0; c < C; ++c) acc[i][c] += v[c] * w;
    }
  }
  for (int i = 0; i < N; ++i)
    for (int c = 0; c < C; ++c) store(&rows.out[row[i] * rows.width + column + c * W], acc[i][c]);
}

template <int N>
void weigh_all(Rows& rows, const int32_t* row, const vec* p, const Block& b) {
  int64_t column = 0;
  for (; column + 4 * W <= rows.width; column += 4 * W) weigh<N, 4>(rows, row, p, b, column);
  for (; column + W <= rows.width; column += W) weigh<N, 1>(rows, row, p, b, column);
}

// A value that is not finite must reach only the rows that attend it (0 * inf is NaN).
void weigh_one_by_one(Rows& rows, int32_t row, vec p, uint32_t mask, const Block& b) {
  for (int j = 0; j < W; ++j)
    if (mask >> j & 1)
      for (int64_t c = 0; c < rows.width; ++c)
        rows.out[row * rows.width + c] += p[j] * b.value[j * b.value_stride + c];
}

template <int N>
void attend_group(Rows& rows, const int32_t* row, const uint16_t* mask, const Block& b) {
  vec s[N];
  logits<N>(rows, row, b.key, s);
  for (int i = 0; i < N; ++i) {
    const ivec lane = lanes_of(mask[i]);
    vec x = b.bias ? s[i] + load(b.bias) : s[i];
    x = lane ? x : splat(NEG_INF);
    const float best = max_lane(x);
    float& top = rows.top[row[i]];
    if (best > top + SLACK) {
      if (top > NEG_INF) {
        const float shrink = std::exp(top - best);
        float* total = &rows.total[row[i] * W];
        store(total, load(total) * shrink);
        float* out = &rows.out[row[i] * rows.width];
        for (int64_t c = 0; c < rows.width; c += W) store(out + c, load(out + c) * shrink);
      }
      top = best;
    }
    // With no finite logit yet (all NaN or none) any finite reference will do.
    const vec p = exp_vec(x - (top > NEG_INF ? top : 0.0f));
    s[i] = lane ? p : vec{};
    float* total = &rows.total[row[i] * W];
    store(total, load(total) + s[i]);
  }
  if (b.finite) {
    if constexpr (N == 8) {
      weigh_all<4>(rows, row, s, b);
      weigh_all<4>(rows, row + 4, s + 4, b);
    } else {
      weigh_all<N>(rows, row, s, b);
    }
  } else {
    for (int i = 0; i < N; ++i) weigh_one_by_one(rows, row[i], s[i], mask[i], b);
  }
}

void attend_block(Rows& rows, const int32_t* row, const uint16_t* mask, int64_t count, const Block& b) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) attend_group<8>(rows, row + i, mask + i, b);
  if (i + 4 <= count) {
    attend_group<4>(rows, row + i, mask + i, b);
    i += 4;
  }
  if (i + 2 <= count) {
    attend_group<2>(rows, row + i, mask + i, b);
    i += 2;
  }
  if (i < count) attend_group<1>(rows, row + i, mask + i, b);
}

// Copy up to 16 keys and values into a block; lanes without a key are zero. Returns the lane mask.
struct Packed {
  uint32_t lanes;
  bool finite;
};

template <typename Index>
Packed pack(Index index, const float* key, int64_t key_stride, const float* value, int64_t value_stride,
            int64_t dim, int64_t value_dim, int64_t width, float* key_out, float* value_out) {
  uint32_t lanes = 0;
  float taint = 0;
  for (int j = 0; j < W; ++j) {
    const int64_t at = index(j);
    float* v = value_out + j * width;
    if (at < 0) {
      for (int64_t d = 0; d < dim; ++d) key_out[d * W + j] = 0;
      std::memset(v, 0, width * sizeof(float));
      continue;
    }
    lanes |= 1u << j;
    const float* k = key + at * key_stride;
    for (int64_t d = 0; d < dim; ++d) key_out[d * W + j] = k[d];
    const float* from = value + at * value_stride;
    for (int64_t d = 0; d < value_dim; ++d) {
      v[d] = from[d];
      taint += from[d] * 0.0f;
    }
    for (int64_t d = value_dim; d < width; ++d) v[d] = 0;
  }
  return {lanes, taint == 0.0f};
}

template <typename Fn>
void parallel(int64_t tasks, int64_t threads, Fn fn) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    auto scratch = fn.scratch();
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) fn.run(task, scratch);
  };
  std::vector<std::thread> pool;
  for (int64_t t = 1; t < std::min(threads, tasks); ++t) pool.emplace_back(work);
  work();
  for (auto& thread : pool) thread.join();
}

struct Span {
  int64_t begin, end, low, high, finished;
};

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

}  // namespace

extern "C" {

struct Geometry {
  int64_t batch, heads, kv_heads, q_len, k_len, dim, value_dim;
  int64_t chunk, cluster, window, causal, sinks, keep, centroids, routes, tile, threads;
  double scale;
};

struct View {  // a [batch, head, position, feature] float tensor; features are contiguous
  float* data;
  int64_t batch, head, position;
};

}  // extern "C"

namespace {

inline float* at(const View& v, int64_t b, int64_t h, int64_t n) {
  return v.data + b * v.batch + h * v.head + n * v.position;
}

// Mirrors layout.spans.
std::vector<Span> spans(const Geometry& g) {
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

// Balanced clusters of one chunk by a tree of median cuts; see kernels/clusterings/pca_tree.py. A task is one
// (batch, KV head, chunk).
struct Cluster {
  const Geometry& g;
  View key, value;
  const uint8_t* member;  // [batch, KV head, place]
  int32_t* order;
  float *mean, *spread, *bias;
  int64_t width = (g.dim + W - 1) / W * W;
  int64_t chunks = (g.k_len + g.chunk - 1) / g.chunk;

  struct Scratch {
    std::vector<float> point, centred, mean, direction, next, along;
    std::vector<int32_t> at, moved;
  };
  Scratch scratch() const {
    Scratch s;
    s.point.resize(g.chunk * width);
    s.centred.resize(g.chunk * width);
    for (auto* v : {&s.mean, &s.direction, &s.next}) v->resize(width);
    s.along.resize(g.chunk);
    s.at.resize(g.chunk);
    s.moved.resize(g.chunk);
    return s;
  }

  float dot(const float* a, const float* b) const {
    vec total = {};
    for (int64_t d = 0; d < width; d += W) total += load(a + d) * load(b + d);
    return sum_lanes(total);
  }
  void add(float* to, const float* from, float times) const {
    for (int64_t d = 0; d < width; d += W) store(to + d, load(to + d) + load(from + d) * times);
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
      std::fill(s.next.begin(), s.next.end(), 0.0f);
      for (int64_t i = first; i < last; ++i) {
        const float* c = &s.centred[i * width];
        add(s.next.data(), c, dot(c, s.direction.data()));
      }
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
      if (in[i]) std::memcpy(&s.point[i * width], at(key, b, kv, begin + i), g.dim * sizeof(float));
    }
    for (int64_t part = g.chunk; part > g.cluster; part /= 2)
      for (int64_t first = 0; first < g.chunk; first += part) split(s, first, first + part, in);
    for (int64_t c = 0; c < per_chunk; ++c) {
      const int64_t first = c * g.cluster, last = first + g.cluster, to = bh * chunks * per_chunk + chunk * per_chunk + c;
      const int64_t count = mean_of(s, first, last, in, s.mean.data());
      const float widen = 2.0f * std::log((float)std::max<int64_t>(count, 1)) / (float)std::max<int64_t>(count, 1);
      float taint = count ? 0.0f : NEG_INF;
      std::fill(s.next.begin(), s.next.end(), 0.0f);
      for (int64_t i = first; i < last; ++i) {
        const int64_t n = begin + s.at[i];
        order[bh * chunks * g.chunk + begin + i] = in[s.at[i]] ? (int32_t)n : -1;
        if (!in[s.at[i]]) continue;
        const float* p = &s.point[s.at[i] * width];
        const float* v = at(value, b, kv, n);
        for (int64_t d = 0; d < g.dim; ++d) {
          const float off = p[d] - s.mean[d];
          s.next[d] += off * off;
          taint += p[d] * 0.0f;
        }
        for (int64_t d = 0; d < g.value_dim; ++d) taint += v[d] * 0.0f;
      }
      for (int64_t d = 0; d < g.dim; ++d) {
        mean[to * g.dim + d] = s.mean[d];
        spread[to * g.dim + d] = s.next[d] * widen;
      }
      bias[to] = taint;
    }
  }
};

struct Route {
  const Geometry& g;
  const View& query;
  const float *mean, *spread, *bias;
  int32_t* routes;
  std::vector<Span> tiles = spans(g);
  int64_t clusters, blocks;
  std::vector<float> packed;  // per KV head and block of 16 clusters: mean [dim][16], spread [dim][16]

  Route(const Geometry& g_, const View& q, const float* m, const float* s, const float* b, int32_t* r)
      : g(g_), query(q), mean(m), spread(s), bias(b), routes(r) {
    clusters = (g.k_len + g.chunk - 1) / g.chunk * (g.chunk / g.cluster);
    blocks = (clusters + W - 1) / W;
    packed.assign(g.batch * g.kv_heads * blocks * 2 * g.dim * W, 0.0f);
    for (int64_t bh = 0; bh < g.batch * g.kv_heads; ++bh)
      for (int64_t c = 0; c < clusters; ++c) {
        float* to = &packed[((bh * blocks + c / W) * 2 * g.dim) * W + c % W];
        for (int64_t d = 0; d < g.dim; ++d) {
          to[d * W] = mean[(bh * clusters + c) * g.dim + d];
          to[(g.dim + d) * W] = spread[(bh * clusters + c) * g.dim + d];
        }
      }
  }

  struct Scratch {
    std::vector<float> query, square, score;
    std::vector<int32_t> rank, chosen;
  };
  Scratch scratch() const { return {}; }

  // Scores of N rows against the blocks [first, last) into score[row][cluster].
  template <int N>
  void score(const Scratch& s, float* out, int64_t row, const float* from, int64_t first, int64_t last,
             const float* b) const {
    for (int64_t block = first; block < last; ++block) {
      const float* m = from + block * 2 * g.dim * W;
      const float* v = m + g.dim * W;
      vec dot[N] = {}, var[N] = {};
      for (int64_t d = 0; d < g.dim; ++d) {
        const vec md = load(m + d * W), vd = load(v + d * W);
        for (int i = 0; i < N; ++i) {
          dot[i] += md * s.query[(row + i) * g.dim + d];
          var[i] += vd * s.square[(row + i) * g.dim + d];
        }
      }
      vec bias_here = splat(NEG_INF);
      for (int j = 0; j < W && block * W + j < clusters; ++j) bias_here[j] = b[block * W + j];
      for (int i = 0; i < N; ++i) {
        alignas(4 * W) float root[W];
        store(root, var[i]);
        for (int j = 0; j < W; ++j) root[j] = std::sqrt(root[j]);
        // By choice, not by sum: -inf + NaN would let a cluster that is empty or not there win.
        const vec sum = dot[i] + load(root) + bias_here;
        store(out + (row + i) * blocks * W + block * W, bias_here == splat(NEG_INF) ? bias_here : sum);
      }
    }
  }

  // Float order as integer order; NaN above all, so that what is not finite is met.
  static ivec rank_of(vec x) {
    const ivec bits = (ivec)x;
    const ivec key = bits ^ ((bits >> 31) & 0x7fffffff);
    return x == x ? key : ivec{} + 0x7fffffff;
  }

  // The `want` best of `count` scores (a multiple of 16), ascending; -inf is never chosen, ties go to
  // the earlier. `out` has room for one more.
  void choose(const float* score, int32_t* rank, int64_t count, int64_t want, int32_t* out) const {
    const int32_t floor = rank_of(splat(NEG_INF))[0];
    auto above = [&](int32_t bar) {
      ivec hits = {};
      for (int64_t c = 0; c < count; c += W) hits -= *(const ivec*)(rank + c) > ivec{} + bar;
      int64_t n = 0;
      for (int j = 0; j < W; ++j) n += hits[j];
      return n;
    };
    ivec least = ivec{} + 0x7fffffff, most = ivec{} + floor;
    for (int64_t c = 0; c < count; c += W) {
      const ivec r = rank_of(load(score + c));
      *(ivec*)(rank + c) = r;
      const ivec real = r > floor ? r : ivec{} + 0x7fffffff;
      least = real < least ? real : least;
      most = r > most ? r : most;
    }
    // The smallest bar with at most `want` ranks above it, by bisection on the integers.
    int64_t bar = floor, ties = 0;
    if (above(floor) > want) {
      int64_t low = *std::min_element(&least[0], &least[0] + W) - (int64_t)1, n = -1;
      bar = *std::max_element(&most[0], &most[0] + W);
      while (low + 1 < bar && n != want) {
        const int64_t middle = (low + bar) / 2;
        n = above((int32_t)middle);
        (n > want ? low : bar) = middle;
      }
      ties = want - above((int32_t)bar);
    }
    int64_t taken = 0;
    const int32_t line = (int32_t)bar;
    if (ties == 0) {
      for (int64_t c = 0; c < count; ++c) {
        out[taken] = (int32_t)c;  // kept only where the next line counts it
        taken += rank[c] > line;
      }
    } else {
      for (int64_t c = 0; c < count; ++c) {
        const bool tie = rank[c] == line && ties > 0;
        ties -= tie;
        if (rank[c] > line || tie) out[taken++] = (int32_t)c;
      }
    }
    for (; taken < want; ++taken) out[taken] = -1;
  }

  void run(int64_t task, Scratch& s) const {
    const Span span = tiles[task % tiles.size()];
    const int64_t bh = task / tiles.size(), b = bh / g.kv_heads, kv = bh % g.kv_heads;
    const int64_t group = g.heads / g.kv_heads, per_chunk = g.chunk / g.cluster;
    const int64_t length = span.end - span.begin, rows = length * group;
    s.query.resize(rows * g.dim);
    s.square.resize(rows * g.dim);
    s.score.resize(rows * blocks * W);
    s.rank.resize(blocks * W);
    s.chosen.resize(g.routes + 1);
    for (int64_t r = 0; r < rows; ++r) {
      const float* q = at(query, b, kv * group + r / length, span.begin + r % length);
      for (int64_t d = 0; d < g.dim; ++d) {
        const float x = q[d] * (float)g.scale;
        s.query[r * g.dim + d] = x;
        s.square[r * g.dim + d] = x * x;
      }
    }
    const float* from = &packed[bh * blocks * 2 * g.dim * W];
    const float* b_ = bias + bh * clusters;
    const int64_t last_cluster = g.causal ? span.low / g.chunk * per_chunk : clusters;
    const int64_t last = (last_cluster + W - 1) / W;
    // A few blocks at a time stay in cache while all the tile's rows pass over them.
    constexpr int64_t STEP = 8;
    for (int64_t first = 0; first < last; first += STEP) {
      const int64_t end = std::min(first + STEP, last);
      int64_t r = 0;
      for (; r + 8 <= rows; r += 8) score<8>(s, s.score.data(), r, from, first, end, b_);
      for (; r < rows; ++r) score<1>(s, s.score.data(), r, from, first, end, b_);
    }
    const int64_t hole_begin = g.causal ? last_cluster : span.low / g.chunk * per_chunk;
    const int64_t hole_end = g.causal ? last * W : (span.high + g.chunk - 1) / g.chunk * per_chunk;
    for (int64_t r = 0; r < rows; ++r) {
      float* score = &s.score[r * blocks * W];
      for (int64_t c = hole_begin; c < std::min(hole_end, last * W); ++c) score[c] = NEG_INF;
      const int64_t h = kv * group + r / length, n = span.begin + r % length;
      choose(score, s.rank.data(), last * W, g.routes, s.chosen.data());
      std::copy_n(s.chosen.data(), g.routes, routes + ((b * g.heads + h) * g.q_len + n) * g.routes);
    }
  }
};

struct Attend {
  const Geometry& g;
  View query, key, value, out;
  const uint8_t* valid;
  const int32_t *order, *routes, *row_index;
  const float *row_key, *row_value, *row_bias;
  std::vector<Span> tiles = spans(g);
  int64_t width, places, rows_total, per_segment;
  std::vector<float> cluster_key, cluster_value;  // blocks of 16 places
  std::vector<uint32_t> cluster_lanes;            // lane mask; bit 16: values are finite

  void prepare() {
    width = (g.value_dim + W - 1) / W * W;
    places = g.routes ? (g.k_len + g.chunk - 1) / g.chunk * g.chunk : 0;
    per_segment = g.keep + g.centroids;
    rows_total = g.sinks + (g.k_len + g.chunk - 1) / g.chunk * per_segment;
    const int64_t blocks = g.batch * g.kv_heads * places / W;
    cluster_key.resize(blocks * g.dim * W);
    cluster_value.resize(blocks * W * width);
    cluster_lanes.resize(blocks);
  }

  struct PackClusters {
    Attend& a;
    int scratch() const { return 0; }
    void run(int64_t task, int) const {  // one task: one (batch, KV head, chunk)
      const int64_t in_chunk = a.g.chunk / W, per_head = a.places / W;
      for (int64_t block = task * in_chunk; block < (task + 1) * in_chunk; ++block) {
        const int64_t bh = block / per_head, b = bh / a.g.kv_heads, kv = bh % a.g.kv_heads;
        const int32_t* order = a.order + block * W;
        const Packed p = pack([&](int j) { return (int64_t)order[j]; }, at(a.key, b, kv, 0), a.key.position,
                              at(a.value, b, kv, 0), a.value.position, a.g.dim, a.g.value_dim, a.width,
                              &a.cluster_key[block * a.g.dim * W], &a.cluster_value[block * W * a.width]);
        a.cluster_lanes[block] = p.lanes | (p.finite ? 1u << W : 0);
      }
    }
  };

  struct Scratch {
    Rows rows;
    std::vector<int32_t> all, listed, start, cursor;
    std::vector<uint16_t> masks;
    std::vector<float> key, value;
    std::vector<uint8_t> copied;
    float bias[W];
  };
  Scratch scratch() const { return {}; }

  void attend_rows(Scratch& s, const Span& span, int64_t bh, int64_t first, int64_t count, int64_t rows) const {
    for (int64_t base = first; base < first + count; base += W) {
      const int32_t* index = row_index + bh * rows_total;
      const float* bias = row_bias + bh * rows_total;
      auto read = [&](int j) -> int64_t {
        const int64_t r = base + j;
        if (r >= first + count || !(bias[r] > NEG_INF)) return -1;
        if (index[r] >= span.low && index[r] < span.high) return -1;
        return r;
      };
      const Packed p = pack(read, row_key + bh * rows_total * g.dim, g.dim, row_value + bh * rows_total * g.value_dim,
                            g.value_dim, g.dim, g.value_dim, width, s.key.data(), s.value.data());
      if (!p.lanes) continue;
      for (int j = 0; j < W; ++j) {
        s.bias[j] = p.lanes >> j & 1 ? bias[base + j] : 0.0f;
        if (!s.copied.empty() && p.lanes >> j & 1 && index[base + j] >= 0) s.copied[index[base + j]] = 1;
      }
      std::fill(s.masks.begin(), s.masks.begin() + rows, (uint16_t)p.lanes);
      attend_block(s.rows, s.all.data(), s.masks.data(), rows, {s.key.data(), s.value.data(), width, s.bias, p.finite});
    }
  }

  void attend_window(Scratch& s, const Span& span, int64_t b, int64_t kv, int64_t rows) const {
    const int64_t length = span.end - span.begin, shift = g.k_len - g.q_len;
    const int64_t stop = g.causal ? std::min(span.high, span.end + shift) : span.high;
    for (int64_t base = span.low; base < stop; base += W) {
      auto read = [&](int j) -> int64_t {
        const int64_t n = base + j;
        return n < stop && (!valid || valid[b * g.k_len + n]) ? n : -1;
      };
      const Packed p = pack(read, at(key, b, kv, 0), key.position, at(value, b, kv, 0), value.position, g.dim,
                            g.value_dim, width, s.key.data(), s.value.data());
      if (!p.lanes) continue;
      int64_t listed = 0;
      for (int64_t r = 0; r < rows; ++r) {
        uint32_t lanes = p.lanes;
        if (g.causal) {
          const int64_t ahead = span.begin + r % length + shift - base;  // last lane this query sees
          if (ahead < 0) continue;
          if (ahead < W - 1) lanes &= (2u << ahead) - 1;
        }
        if (!lanes) continue;
        s.listed[listed] = (int32_t)r;
        s.masks[listed++] = (uint16_t)lanes;
      }
      attend_block(s.rows, s.listed.data(), s.masks.data(), listed, {s.key.data(), s.value.data(), width, nullptr, p.finite});
    }
  }

  void attend_routes(Scratch& s, const Span& span, int64_t b, int64_t kv, int64_t rows) const {
    const int64_t length = span.end - span.begin, group = g.heads / g.kv_heads, bh = b * g.kv_heads + kv;
    const int64_t clusters = places / g.cluster, per_cluster = g.cluster / W;
    auto routes_of = [&](int64_t r) {
      const int64_t h = kv * group + r / length, n = span.begin + r % length;
      return routes + ((b * g.heads + h) * g.q_len + n) * g.routes;
    };
    s.start.assign(clusters + 1, 0);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < g.routes && routes_of(r)[i] >= 0; ++i) ++s.start[routes_of(r)[i] + 1];
    for (int64_t c = 0; c < clusters; ++c) s.start[c + 1] += s.start[c];
    s.cursor.assign(s.start.begin(), s.start.end());
    s.listed.resize(std::max<int64_t>(rows, s.start[clusters]));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < g.routes && routes_of(r)[i] >= 0; ++i) s.listed[s.cursor[routes_of(r)[i]]++] = (int32_t)r;
    for (int64_t c = 0; c < clusters; ++c) {
      const int64_t count = s.start[c + 1] - s.start[c];
      if (!count) continue;
      for (int64_t i = 0; i < per_cluster; ++i) {
        const int64_t block = bh * (places / W) + c * per_cluster + i;
        uint32_t lanes = cluster_lanes[block] & 0xffff;
        if (!s.copied.empty())
          for (int j = 0; j < W; ++j)
            if (lanes >> j & 1 && s.copied[order[block * W + j]]) lanes &= ~(1u << j);
        if (!lanes) continue;
        std::fill(s.masks.begin(), s.masks.begin() + count, (uint16_t)lanes);
        attend_block(s.rows, &s.listed[s.start[c]], s.masks.data(), count,
                     {&cluster_key[block * g.dim * W], &cluster_value[block * W * width], width, nullptr,
                      (cluster_lanes[block] >> W & 1) != 0});
      }
    }
  }

  void run(int64_t task, Scratch& s) const {
    // Later tiles see more: begin with them, so that the threads end together.
    const Span& span = tiles[tiles.size() - 1 - task % tiles.size()];
    const int64_t bh = task / tiles.size(), b = bh / g.kv_heads, kv = bh % g.kv_heads;
    const int64_t group = g.heads / g.kv_heads, length = span.end - span.begin, rows = length * group;
    s.rows.reset(rows, g.dim, width);
    s.key.resize(g.dim * W);
    s.value.resize(W * width);
    s.all.resize(rows);
    s.masks.resize(rows);
    s.listed.resize(rows);
    s.copied.assign(g.keep && g.routes ? g.k_len : 0, 0);
    for (int64_t r = 0; r < rows; ++r) {
      s.all[r] = (int32_t)r;
      const float* q = at(query, b, kv * group + r / length, span.begin + r % length);
      for (int64_t d = 0; d < g.dim; ++d) s.rows.query[r * g.dim + d] = q[d] * (float)g.scale;
    }
    attend_window(s, span, b, kv, rows);
    if (span.finished) attend_rows(s, span, bh, 0, g.sinks, rows);
    for (int64_t f = per_segment ? span.finished : 0; f > 0; f -= f & -f)
      attend_rows(s, span, bh, g.sinks + (f - 1) * per_segment, per_segment, rows);
    if (g.routes) attend_routes(s, span, b, kv, rows);
    for (int64_t r = 0; r < rows; ++r) {
      const float total = sum_lanes(load(&s.rows.total[r * W]));
      float* to = at(out, b, kv * group + r / length, span.begin + r % length);
      const float* from = &s.rows.out[r * width];
      for (int64_t c = 0; c < g.value_dim; ++c) to[c] = total == 0.0f ? 0.0f : from[c] / total;
    }
  }
};

template <typename T>
struct ByReference {  // lets `parallel` share one object
  T& it;
  auto scratch() const { return it.scratch(); }
  template <typename S>
  void run(int64_t task, S& s) const { it.run(task, s); }
};

}  // namespace

extern "C" {

void prescore_cluster(const Geometry* g, const View* key, const View* value, const uint8_t* member, int32_t* order,
                      float* mean, float* spread, float* bias) {
  Cluster cluster{*g, *key, *value, member, order, mean, spread, bias};
  parallel(g->batch * g->kv_heads * cluster.chunks, g->threads, ByReference<Cluster>{cluster});
}

void prescore_route(const Geometry* g, const View* query, const float* mean, const float* spread, const float* bias,
                    int32_t* routes) {
  Route route(*g, *query, mean, spread, bias, routes);
  parallel(g->batch * g->kv_heads * (int64_t)route.tiles.size(), g->threads, ByReference<Route>{route});
}

void prescore_attend(const Geometry* g, const View* query, const View* key, const View* value, const View* out,
                     const uint8_t* valid, const int32_t* order, const int32_t* routes, const int32_t* row_index,
                     const float* row_key, const float* row_value, const float* row_bias) {
  Attend attend{*g, *query, *key, *value, *out, valid, order, routes, row_index, row_key, row_value, row_bias};
  attend.prepare();
  if (g->routes) {
    Attend::PackClusters clusters{attend};
    parallel(g->batch * g->kv_heads * attend.places / g->chunk, g->threads, clusters);
  }
  parallel(g->batch * g->kv_heads * (int64_t)attend.tiles.size(), g->threads, ByReference<Attend>{attend});
}

}  // extern "C"
