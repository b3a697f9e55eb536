// The CPU lowering of clustering, `route` and `attend`, the last two also as one, a tile's queries being routed just
// before they attend; kernels/reference.py says what they compute.
//
// attend works tile by tile: `tile` consecutive queries times the query heads of one KV head are
// the rows of a tile. Keys come in blocks of 16, stored [dim][16], so that a vector holds one
// feature of several keys. Every source is a list of (row, 16-bit lane mask) against a block: the window
// and the rows take all the tile's rows; a routed cluster takes those that routed to it (a counting
// sort of the tile's routes), so its keys are loaded once for all of them; the centroids of a
// residual take all rows but those. A tile of one query is the query-major order, a large tile the
// cluster-major one. Where there are tiles of bfloat16 (native/tiles.h), and all that is read is
// bfloat16, blocks are attended 16 rows at a time by their products.

#include "native/allowed.h"
#include "native/backward.h"
#include "native/blocks.h"
#include "native/cluster.h"
#include "native/few.h"
#include "native/route.h"
#include "native/simd.h"
#include "native/site.h"
#include "native/softmax.h"
#include "native/sources.h"

namespace prescore {

template <typename Layout>
struct Attend {
  const Geometry& g;
  const Sources& from;
  View query, out;
  float* mass;    // [batch, head, query]: logarithm of the softmax's sum; or null
  Route* router;  // finds the routes; or null, where they are given

  using Number = typename Layout::Number;
  std::vector<Span> tiles = spans(g);
  Visible visible{g, from.allowed, tiles};
  int64_t key_size = Layout::key_size(g.dim);
  int64_t group = g.heads / g.kv_heads, width = (g.value_dim + W - 1) / W * W;
  int64_t chunks = (g.k_len + g.chunk - 1) / g.chunk, places = g.routes ? chunks * g.chunk : 0;
  int64_t per_segment = g.keep + g.centroids, rows_total = g.sinks + chunks * per_segment;

  static constexpr int64_t MOST_BLOCKS = 4;  // of a cluster, and that a layout attends at once
  // Clusters are packed for the KV heads [packed_from, packed_to) at a time: a copy of all keys and
  // values would be as large as they are, and fewer would be too few for many threads.
  static constexpr int64_t PACKED_BYTES = 2 << 20;  // a thread
  int64_t packed_from = 0, packed_to = 0;
  std::vector<Number> cluster_key, cluster_value;  // blocks of 16 places
  std::vector<uint32_t> cluster_lanes;             // lane mask; bit 16: values are finite
  // A residual's centroids, one a cluster: blocks of 16 of them, as keys. Bias -inf: no key.
  int64_t clusters = places / g.cluster, centroid_blocks = g.residual ? (clusters + W - 1) / W : 0;
  std::vector<Number> centroid_key, centroid_value;
  std::vector<float> centroid_bias;

  struct Scratch {
    Tiles tiles;
    Rows rows;
    std::vector<int32_t> all, listed, start, cursor;
    std::vector<uint16_t> masks;
    std::vector<Number> key, value;
    typename Layout::Scratch packing;
    std::vector<uint8_t> copied;
    float bias[Layout::AT_ONCE][W];
    Route::Scratch route;  // what a router needs and finds: sums over window and sinks, and routes, of each row
    std::vector<float> near;
    std::vector<int32_t> routes;
  };
  Scratch scratch() const { return {Tiles(std::is_same_v<Layout, Narrow>)}; }

  template <typename Index>
  Packed pack(Index index, const View& key, const View& value, int64_t b, int64_t h,
              typename Layout::Scratch& scratch, Number* key_out, Number* value_out) const {
    return Layout::pack(index, key, value, b, h, g, width, scratch, key_out, value_out);
  }

  struct PackClusters {
    Attend& a;
    typename Layout::Scratch scratch() const { return {}; }
    void run(int64_t task, typename Layout::Scratch& packing) const {  // one task: one (batch, KV head, chunk)
      const int64_t bh = task / a.chunks, b = bh / a.g.kv_heads, kv = bh % a.g.kv_heads, in_chunk = a.g.chunk / W;
      for (int64_t block = task * in_chunk; block < (task + 1) * in_chunk; ++block) {
        const int32_t* order = a.from.order + block * W;
        const int64_t to = block - a.packed_from * a.places / W;
        const Packed p = a.pack([&](int j) { return (int64_t)order[j]; }, a.from.key, a.from.value, b, kv, packing,
                                &a.cluster_key[to * a.key_size], &a.cluster_value[to * W * a.width]);
        a.cluster_lanes[to] = p.lanes | (p.finite ? 1u << W : 0);
      }
      if (a.g.residual)
        for (int64_t c = 0; c < a.g.chunk / a.g.cluster; ++c) a.average(bh, task % a.chunks * (a.g.chunk / a.g.cluster) + c);
    }
  };

  // The centroid of one packed cluster; lanes without a key are zero.
  void average(int64_t bh, int64_t cluster) {
    const int64_t head = bh - packed_from, first = (head * places + cluster * g.cluster) / W;
    const int64_t block = head * centroid_blocks + cluster / W, lane = cluster % W;
    int64_t count = 0;
    for (int64_t b = first; b < first + g.cluster / W; ++b) count += __builtin_popcount(cluster_lanes[b] & ALL);
    centroid_bias[block * W + lane] = count ? (float)(std::log((double)count) * LOG2_E) : NEG_INF;
    Layout::average(&cluster_key[first * key_size], &cluster_value[first * W * width], g.cluster / W,
                    1.0f / (float)std::max<int64_t>(count, 1), g.dim, width, &centroid_key[block * key_size],
                    &centroid_value[block * W * width], lane);
  }

  // The centroids outside the window, for each row those of the clusters that it did not route to; the
  // routes are sorted by cluster.
  void attend_residual(Scratch& s, const Span& span, int64_t head, int64_t rows) const {
    const int64_t per_chunk = g.chunk / g.cluster, low = span.low / g.chunk * per_chunk;
    const int64_t high = g.causal ? clusters : (span.high + g.chunk - 1) / g.chunk * per_chunk;
    Block<Number> blocks[Layout::AT_ONCE];
    for (int64_t block = 0, found = 0; block < centroid_blocks; ++block) {
      const int64_t at = head * centroid_blocks + block;
      const float* bias = &centroid_bias[at * W];
      const Number* value = &centroid_value[at * W * width];
      uint32_t lanes = 0;
      for (int64_t c = block * W; c < std::min((block + 1) * W, clusters); ++c)
        if ((c < low || c >= high) && bias[c % W] > NEG_INF) lanes |= 1u << c % W;
      if (lanes) {
        uint16_t* masks = &s.masks[found * rows];
        std::fill_n(masks, rows, (uint16_t)lanes);
        for (int64_t c = block * W; c < std::min((block + 1) * W, clusters); ++c)
          for (int64_t i = s.start[c]; i < s.start[c + 1]; ++i) masks[s.listed[i]] &= (uint16_t)~(1u << c % W);
        for (int j = 0; j < W; ++j) s.bias[found][j] = lanes >> j & 1 ? bias[j] : 0.0f;
        blocks[found] = {&centroid_key[at * key_size], value, s.bias[found], Layout::finite(value, width), masks};
        ++found;
      }
      if (found == Layout::AT_ONCE || (found && block + 1 == centroid_blocks)) {
        Layout::attend(s.rows, s.all.data(), rows, blocks, found);
        found = 0;
      }
    }
  }

  void attend_rows(Scratch& s, const Span& span, int64_t b, int64_t kv, int64_t first, int64_t count,
                   int64_t rows) const {
    const int64_t bh = b * g.kv_heads + kv;
    const int32_t* index = from.row_index + bh * rows_total;
    const float* bias = from.row_bias + bh * rows_total;
    for (int64_t base = first; base < first + count; base += W) {
      auto at = [&](int j) -> int64_t {
        const int64_t r = base + j;
        if (r >= first + count || !(bias[r] > NEG_INF)) return -1;
        if (index[r] >= span.low && index[r] < span.high) return -1;
        return r;
      };
      const Packed p = pack(at, from.row_key, from.row_value, b, kv, s.packing, s.key.data(), s.value.data());
      if (!p.lanes) continue;
      bool biased = false;
      for (int j = 0; j < W; ++j) {
        s.bias[0][j] = p.lanes >> j & 1 ? bias[base + j] * (float)LOG2_E : 0.0f;
        biased |= s.bias[0][j] != 0.0f;
        if (!s.copied.empty() && p.lanes >> j & 1 && index[base + j] >= 0) s.copied[index[base + j]] = 1;
      }
      std::fill_n(s.masks.begin(), rows, (uint16_t)p.lanes);
      const Block<Number> block{s.key.data(), s.value.data(), biased ? s.bias[0] : nullptr, p.finite, s.masks.data()};
      Layout::attend(s.rows, s.all.data(), rows, &block, 1);
    }
  }

  // The lanes that the mask in memory lets each row see, of blocks from `base` on; whether there are any.
  bool read_masks(Scratch& s, const Span& span, int64_t b, int64_t kv, int64_t base, int64_t rows) const {
    const int64_t length = span.end - span.begin, fresh = from.allowed.head ? rows : length;
    uint32_t any = 0;
    for (int64_t i = 0; i < Layout::AT_ONCE; ++i) {
      const int64_t first = base + i * W, count = std::clamp<int64_t>(g.k_len - first, 0, W);
      const uint8_t* allowed = from.allowed.data + b * from.allowed.batch + first;
      uint16_t* masks = &s.masks[i * rows];
      for (int64_t r = 0; r < fresh; ++r) {
        const int64_t head = kv * group + r / length, at = span.begin + r % length;
        masks[r] = (uint16_t)bits_of(allowed + head * from.allowed.head + at * from.allowed.query, count);
        any |= masks[r];
      }
      for (int64_t r = fresh; r < rows; ++r) masks[r] = masks[r - length];
    }
    return any != 0;
  }

  void attend_window(Scratch& s, const Span& span, int64_t b, int64_t kv, int64_t rows) const {
    const int64_t length = span.end - span.begin;
    const Reach reach(g, from, span);
    const bool masked = from.allowed.data != nullptr;
    const int64_t tile = &span - tiles.data();
    constexpr int64_t N = Layout::AT_ONCE;
    Block<Number> blocks[N];
    uint32_t lanes[N];
    for (int64_t base = reach.start; base < reach.stop; base += N * W) {
      if (masked && !(visible(tile, b, kv, base) && read_masks(s, span, b, kv, base, rows))) continue;
      uint32_t any = 0;
      for (int64_t i = 0; i < N; ++i) {
        auto at = [&](int j) -> int64_t {
          const int64_t n = base + i * W + j;
          return n < reach.stop && (!from.valid || from.valid[b * g.k_len + n]) ? n : -1;
        };
        Number *key = &s.key[i * key_size], *value = s.value.data() + i * W * width;  // no values: of a mass
        const Packed p = pack(at, from.key, from.value, b, kv, s.packing, key, value);
        blocks[i] = {key, value, nullptr, p.finite, &s.masks[i * rows]};
        any |= lanes[i] = p.lanes;
      }
      if (!any) continue;
      if (!masked && reach.all_attend(base + N * W - 1)) {
        for (int64_t i = 0; i < N; ++i) std::fill_n(&s.masks[i * rows], rows, (uint16_t)lanes[i]);
        Layout::attend(s.rows, s.all.data(), rows, blocks, N);
        continue;
      }
      int64_t listed = 0;
      for (int64_t r = 0, at = 0; r < rows; ++r, at = at + 1 < length ? at + 1 : 0) {
        any = 0;
        for (int64_t i = 0; i < N; ++i) {
          uint32_t seen = lanes[i] & reach.lanes(at, base + i * W);
          if (masked) seen &= s.masks[i * rows + r];  // what is listed never passes what is read
          s.masks[i * rows + listed] = (uint16_t)seen;
          any |= seen;
        }
        s.listed[listed] = (int32_t)r;
        listed += any != 0;
      }
      Layout::attend(s.rows, s.listed.data(), listed, blocks, N);
    }
  }

  // The natural logarithm of a row's softmax's sum so far.
  static float log_sum_of(const Rows& rows, int64_t r) {
    const float total = std::log2(sum_lanes(load(&rows.total[r * L])));
    return (rows.top[r] > NEG_INF ? rows.top[r] + total : total) / (float)LOG2_E;
  }

  // Routes of a tile whose rows have attended window and sinks, and nothing else.
  Entries<const int32_t> find_routes(Scratch& s, const Span& span, int64_t b, int64_t kv, int64_t rows) const {
    const bool needed = g.log_share > NEG_INF || g.group_routes;
    s.near.resize(rows);
    s.routes.resize(rows * g.routes);
    for (int64_t r = 0; needed && r < rows; ++r) s.near[r] = log_sum_of(s.rows, r);
    const int64_t length = span.end - span.begin;
    const Entries<int32_t> found{s.routes.data(), length, length, g.routes};
    router->run_tile(s.route, span, b, kv, {needed ? s.near.data() : nullptr, length, length, 1}, found);
    return {found.data, length, length, g.routes};
  }

  void attend_routes(Scratch& s, const Span& span, int64_t b, int64_t kv, int64_t rows,
                     const Entries<const int32_t>& routes_of) const {
    const int64_t bh = b * g.kv_heads + kv;
    const int64_t per_cluster = g.cluster / W;
    sort_by_cluster(routes_of, rows, clusters, s.start, s.cursor, s.listed);
    if (g.residual) attend_residual(s, span, bh - packed_from, rows);
    for (int64_t c = 0; c < clusters; ++c) {
      const int64_t count = s.start[c + 1] - s.start[c];
      if (!count) continue;
      Block<Number> blocks[MOST_BLOCKS];
      int64_t found = 0;
      for (int64_t i = 0; i < per_cluster; ++i) {
        const int64_t in_head = c * per_cluster + i, block = (bh - packed_from) * (places / W) + in_head;
        const int32_t* order = from.order + bh * places + in_head * W;
        uint32_t lanes = cluster_lanes[block] & ALL;
        if (!s.copied.empty())
          for (int j = 0; j < W; ++j)
            if (lanes >> j & 1 && s.copied[order[j]]) lanes &= ~(1u << j);
        if (!lanes) continue;
        uint16_t* masks = &s.masks[found * count];
        std::fill_n(masks, count, (uint16_t)lanes);
        blocks[found++] = {&cluster_key[block * key_size], &cluster_value[block * W * width], nullptr,
                           (cluster_lanes[block] >> W & 1) != 0, masks};
      }
      Layout::attend(s.rows, &s.listed[s.start[c]], count, blocks, found);
    }
  }

  void run(int64_t task, Scratch& s) const {
    // Later tiles see more: begin with them, so that the threads end together.
    const int64_t count = tiles.size(), bh = task / count, b = bh / g.kv_heads, kv = bh % g.kv_heads;
    const Span& span = tiles[count - 1 - task % count];
    const int64_t length = span.end - span.begin, rows = length * group;
    s.rows.reset(rows, g.dim, width, g.scale, g.softcap);
    Layout::reserve(s.rows, rows);
    s.key.resize(Layout::AT_ONCE * key_size);
    s.value.resize(Layout::AT_ONCE * W * width);
    s.all.resize(rows);
    s.masks.resize(MOST_BLOCKS * rows);
    s.listed.resize(rows);
    s.copied.assign(g.keep && g.routes ? g.k_len : 0, 0);
    for (int64_t r = 0; r < rows; ++r) {
      s.all[r] = (int32_t)r;
      Layout::read_query(s.rows, r, query, b, kv * group + r / length, span.begin + r % length);
      if (!from.sink_logit) continue;
      float logit;
      read(*from.sink_logit, b, kv * group + r / length, span.begin + r % length, 1, &logit);
      s.rows.begin_with(r, logit);
    }
    attend_window(s, span, b, kv, rows);
    if (span.finished) attend_rows(s, span, b, kv, 0, g.sinks, rows);
    const Entries<const int32_t> routes =
        router ? find_routes(s, span, b, kv, rows) : entries(from.routes, g, span, b, kv, g.routes);
    for (int64_t f = per_segment ? span.finished : 0; f > 0; f -= f & -f)
      attend_rows(s, span, b, kv, g.sinks + (f - 1) * per_segment, per_segment, rows);
    if (g.routes) attend_routes(s, span, b, kv, rows, routes);
    const Entries<float> sums = entries(mass, g, span, b, kv, 1);
    for (int64_t r = 0; r < rows; ++r) {
      if (mass) *sums(r) = log_sum_of(s.rows, r);
      const float total = sum_lanes(load(&s.rows.total[r * L]));
      float* result = s.rows.out.data() + r * width;
      for (int64_t c = 0; c < g.value_dim; ++c) result[c] = total == 0.0f ? 0.0f : result[c] / total;
      write(out, b, kv * group + r / length, span.begin + r % length, g.value_dim, result);
    }
  }

  void run_all() {
    const int64_t heads = g.batch * g.kv_heads, head_bytes = places * (key_size / W + width) * (int64_t)sizeof(Number);
    const int64_t at_once = std::clamp<int64_t>(PACKED_BYTES * g.threads / std::max<int64_t>(head_bytes, 1), 1, heads);
    cluster_key.resize(at_once * places / W * key_size);
    cluster_value.resize(at_once * places * width);
    cluster_lanes.resize(at_once * places / W);
    centroid_key.resize(at_once * centroid_blocks * key_size);
    centroid_value.resize(at_once * centroid_blocks * W * width);
    centroid_bias.resize(at_once * centroid_blocks * W);
    if (from.allowed.data) visible.find();
    for (; packed_from < heads; packed_from = packed_to) {
      packed_to = std::min(packed_from + at_once, heads);
      if (router) router->pack(packed_from, packed_to);
      if (g.routes) {
        PackClusters packing{*this};
        parallel(packed_from * chunks, packed_to * chunks, g.threads, packing);
      }
      parallel(packed_from * (int64_t)tiles.size(), packed_to * (int64_t)tiles.size(), g.threads, *this);
    }
  }
};

void attend(const Geometry& g, const Sources& from, const View& query, const View& out, float* mass, Route* router) {
  if (g.narrow && may_use_tiles())
    Attend<Narrow>{g, from, query, out, mass, router}.run_all();
  else
    Attend<Wide>{g, from, query, out, mass, router}.run_all();
}

}  // namespace prescore

extern "C" {

// Whether this processor has tiles of bfloat16 that this process may use.
int64_t prescore_tiles() { return prescore::HAVE_TILES && prescore::may_use_tiles(); }

void prescore_cluster(const Geometry* g, const View* key, const View* value, const uint8_t* member, int32_t* order,
                      float* mean, float* spread, float* bias) {
  prescore::Cluster cluster{*g, *key, *value, member, order, mean, spread, bias};
  prescore::parallel(0, g->batch * g->kv_heads * cluster.chunks, g->threads, cluster);
}

// Representatives of clusters, then those of chunks (null on one level).
void prescore_route(const Geometry* g, const View* query, const float* mean, const float* spread, const float* bias,
                    const float* chunk_mean, const float* chunk_spread, const float* chunk_bias, const float* mass,
                    int32_t* routes) {
  prescore::Route route{*g, *query, {mean, spread, bias}, {chunk_mean, chunk_spread, chunk_bias}};
  route.pack(0, g->batch * g->kv_heads);
  const prescore::RouteAll all{route, mass, routes};
  prescore::parallel(0, g->batch * g->kv_heads * (int64_t)route.tiles.size(), g->threads, all);
}

void prescore_attend(const Geometry* g, const View* query, const View* key, const View* value, const View* out,
                     const uint8_t* valid, const int32_t* order, const int32_t* routes, const int32_t* row_index,
                     const View* row_key, const View* row_value, const float* row_bias, const View* sink_logit,
                     const int64_t* band, const Allowed* allowed) {
  const prescore::Sources from{*key,     *value,     valid,    order,      routes, row_index,
                               *row_key, *row_value, row_bias, sink_logit, band,   allowed ? *allowed : Allowed{}};
  prescore::attend(*g, from, *query, *out, nullptr, nullptr);
}

// Gradients of attend, without a mask in memory; of a residual's centroids, where there are any, as of rows. By parts
// [splits, ...] of keys, values, rows and centroids, zeros before.
void prescore_backward(const Geometry* g, const View* query, const View* key, const View* value, const View* grad,
                       const uint8_t* valid, const int32_t* order, const int32_t* routes, const int32_t* row_index,
                       const View* row_key, const View* row_value, const float* row_bias, const View* sink_logit,
                       const int64_t* band, const View* rest_key, const View* rest_value, const float* rest_bias,
                       int64_t splits, float* d_query, float* d_key, float* d_value, float* d_row_key, float* d_row_value,
                       float* d_rest_key, float* d_rest_value, float* d_sink) {
  const prescore::Sources from{*key,     *value,     valid,    order,     routes, row_index,
                               *row_key, *row_value, row_bias, sink_logit, band};
  prescore::Backward work{*g,      from,    *query,  *grad,     rest_key,    rest_value, rest_bias,    splits,
                          d_query, d_key, d_value, d_row_key, d_row_value, d_rest_key, d_rest_value, d_sink};
  prescore::parallel(0, g->batch * g->kv_heads * splits, g->threads, work);
}

// Few queries over every key that a mask in memory allows.
void prescore_few(const Geometry* g, const View* query, const View* key, const View* value, const View* out,
                  const Allowed* allowed, const View* added, const View* sink_logit) {
  prescore::Few{*g, *query, *key, *value, *out, allowed ? *allowed : Allowed{}, added, sink_logit}.run_all();
}

// Both, without routes in memory.
void prescore_route_attend(const Geometry* g, const View* query, const View* key, const View* value, const View* out,
                           const uint8_t* valid, const int32_t* order, const float* mean, const float* spread,
                           const float* bias, const float* chunk_mean, const float* chunk_spread,
                           const float* chunk_bias, const int32_t* row_index, const View* row_key,
                           const View* row_value, const float* row_bias, const View* sink_logit) {
  const prescore::Sources from{*key,     *value,     valid,    order,     nullptr, row_index,
                               *row_key, *row_value, row_bias, sink_logit};
  prescore::Route route{*g, *query, {mean, spread, bias}, {chunk_mean, chunk_spread, chunk_bias}};
  prescore::attend(*g, from, *query, *out, nullptr, &route);
}

// A mask of numbers [batch, head, query, key] as bytes; *hides: whether it says no more than that.
void prescore_as_bytes(const View* mask, const int64_t* sizes, double lowest, int64_t threads, uint8_t* to,
                       uint8_t* none, int64_t* hides) {
  prescore::AsBytes bytes{*mask, sizes[0], sizes[1], sizes[2], sizes[3], (float)lowest, to, none};
  prescore::parallel(0, sizes[0] * sizes[1] * sizes[2], threads, bytes);
  *hides = bytes.hides;
}

// Of a mask in memory, how much of what it says is not to be skipped, from 0 to 1.
void prescore_share(const Geometry* g, const Allowed* allowed, double* share) {
  const std::vector<prescore::Span> tiles = prescore::spans(*g);
  prescore::Visible visible{*g, *allowed, tiles};
  visible.find();
  *share = visible.share();
}

// Whether a mask in memory is causality (or all keys) and the last query's keys; `used`: keys up to its own.
void prescore_recognize(const Geometry* g, const Allowed* allowed, int64_t used, int64_t* same) {
  prescore::Recognized recognized{*g, *allowed, g->causal != 0, used};
  *same = recognized.find();
}

// As attend over window, sinks and a learned one, with values of no features: only the sums are wanted.
void prescore_mass(const Geometry* g, const View* query, const View* key, const uint8_t* valid,
                   const int32_t* row_index, const View* row_key, const float* row_bias, const View* sink_logit,
                   float* mass) {
  const prescore::Sources from{*key, *key, valid, nullptr, nullptr, row_index, *row_key, *row_key, row_bias, sink_logit};
  prescore::attend(*g, from, *query, *query, mass, nullptr);
}

}  // extern "C"
