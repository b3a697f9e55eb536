// Routing: which clusters a query attends; routing.route and, on two levels, coarse.route say what is computed.

#pragma once

#include "choose.h"
#include "simd.h"
#include "site.h"
#include "tiles.h"

namespace prescore {

struct Level {  // representatives of clusters, or of chunks: mean, spread [batch, KV head, count, dim], bias
  const float *mean, *spread, *bias;
};

struct Route {
  const Geometry& g;
  View query;
  Level of_clusters, of_chunks;  // the second only on two levels

  static constexpr int V = 2, BLOCK = V * L;          // representatives scored at once
  static constexpr int GROUP = L == 16 ? 12 : 6;      // rows scored at once: the registers there are
  static constexpr int64_t ROWS = 48;                 // rows whose ranks stay in cache until they are chosen from
  static constexpr int64_t NARROW_ROWS = 64;          // the same by tiles, which take 32
  static constexpr int64_t STEP = 4;                  // blocks that stay in cache while the rows pass over them

  std::vector<Span> tiles = spans(g);
  int64_t heads = g.group_routes ? g.heads / g.kv_heads : 1;  // that route together
  int64_t per_chunk = g.chunk / g.cluster, chunks = (g.k_len + g.chunk - 1) / g.chunk;
  // By products of tiles: each number is the sum of two in bfloat16, which is nearly what float32 gives.
  bool narrow = g.narrow && may_use_tiles() && BLOCK == 2 * SIDE;
  int64_t steps = (g.dim + STEP_OF - 1) / STEP_OF, part = steps * STEP_OF;
  int64_t block_size = (narrow ? 2 * part + 1 : 2 * g.dim + 1) * BLOCK;
  // Of the KV heads from packed_from on, per block: mean [dim][BLOCK], spread [dim][BLOCK], bias [BLOCK]. Of tiles: for
  // each 16 of the BLOCK, as bfloat16, mean, what that leaves, spread, what that leaves, as columns of tile_sums; bias.
  int64_t packed_from = 0;
  std::vector<float> clusters, level;

  static int64_t blocks_of(int64_t count) { return (count + BLOCK - 1) / BLOCK; }

  void pack(int64_t from, int64_t to) {
    packed_from = from;
    clusters = packed(of_clusters, chunks * per_chunk, from, to);
    if (g.coarse) level = packed(of_chunks, chunks, from, to);
  }

  std::vector<float> packed(const Level& from, int64_t count, int64_t first, int64_t last) const {
    const int64_t blocks = blocks_of(count);
    std::vector<float> to((last - first) * blocks * block_size);
    const Pack pack{*this, from, count, blocks, first, to.data()};
    parallel(0, (last - first) * ((blocks + Pack::BLOCKS - 1) / Pack::BLOCKS), g.threads, pack);
    return to;
  }

  struct Pack {
    const Route& r;
    const Level& from;
    int64_t count, blocks, first;
    float* to;

    static constexpr int64_t BLOCKS = 4;  // a task
    int scratch() const { return 0; }
    void run(int64_t task, int&) const {
      const int64_t tasks = (blocks + BLOCKS - 1) / BLOCKS, head = task / tasks, start = task % tasks * BLOCKS;
      for (int64_t block = start; block < std::min(start + BLOCKS, blocks); ++block)
        r.pack_block(from, (first + head) * count, block * BLOCK, count, to + (head * blocks + block) * r.block_size);
    }
  };

  // The clusters from `begin` on, of `count`, of the head whose first is `first`.
  void pack_block(const Level& from, int64_t first, int64_t begin, int64_t count, float* to) const {
    uint16_t* tiles_of = reinterpret_cast<uint16_t*>(to);
    for (int64_t lane = 0; lane < BLOCK; ++lane) {
      const int64_t c = begin + lane;
      to[block_size - BLOCK + lane] = c < count ? from.bias[first + c] : NEG_INF;
      if (c >= count) continue;
      const float *mean = from.mean + (first + c) * g.dim, *spread = from.spread + (first + c) * g.dim;
      if (narrow) {
        uint16_t* tile = tiles_of + lane / SIDE * 4 * part * SIDE;
        split(mean, tile, lane % SIDE);
        split(spread, tile + 2 * part * SIDE, lane % SIDE);
        continue;
      }
      for (int64_t d = 0; d < g.dim; ++d) {
        to[d * BLOCK + lane] = mean[d];
        to[(g.dim + d) * BLOCK + lane] = spread[d];
      }
    }
  }

  // A column of two parts, of numbers as bfloat16 and of what that leaves.
  void split(const float* from, uint16_t* to, int64_t column) const {
    for (int64_t d = 0; d < g.dim; ++d) {
      const int64_t at = (d / 2 * SIDE + column) * 2 + d % 2;
      const uint16_t high = prescore::narrow(from[d]), rest = prescore::narrow(from[d] - widen(high));
      std::memcpy(to + at, &high, sizeof(high));  // where floats lie
      std::memcpy(to + part * SIDE + at, &rest, sizeof(rest));
    }
  }

  struct Scratch {
    std::vector<int64_t> row;       // rows of the tile that are scored at once
    std::vector<float> query, square, mass;
    std::vector<uint16_t> parts;    // of tiles: [row][query, its square, what bfloat16 leaves of that]
    std::vector<int32_t> rank;      // [row][listed blocks * BLOCK]
    std::vector<int32_t> listed;    // the blocks that are scored, ascending
    std::vector<int32_t> chosen;    // [row][coarse]: chunks, ascending, then -1
    std::vector<uint8_t> wanted;    // chunks that any row chose
    Chooser chooser;
  };

  // Ranks of N rows against the listed blocks [first, last).
  struct Score {
    const Route& r;
    Scratch& s;
    const float* from;
    int64_t first, last;

    // Inlined into all that surrounds it, GCC keeps too few of the sums in registers: half the speed.
    template <int N>
    __attribute__((noinline)) void run(int64_t row) const {
      const int64_t dim = r.g.dim, width = (int64_t)s.listed.size() * BLOCK;
      const float *q[N], *square[N];
      for (int i = 0; i < N; ++i) {
        q[i] = &s.query[(row + i) * dim];
        square[i] = &s.square[(row + i) * dim];
      }
      for (int64_t at = first; at < last; ++at) {
        const float* m = from + s.listed[at] * r.block_size;
        vec dot[N][V], var[N][V];
        products<N, V>(square, dim, m + dim * BLOCK, var);
        products<N, V>(q, dim, m, dot);
        for (int v = 0; v < V; ++v) {
          const vec bias = load(m + 2 * dim * BLOCK + v * L);
          const ivec empty = bias == NEG_INF;
          for (int i = 0; i < N; ++i) {
            // By choice, not by sum: -inf + NaN would let a cluster that is empty or not there win.
            const ivec rank = empty ? isplat(LOWEST_RANK) : rank_of(dot[i][v] + root(var[i][v]) + bias);
            istore(&s.rank[(row + i) * width + at * BLOCK + v * L], rank);
          }
        }
      }
    }
  };

  // The same of 32 rows, by tiles.
  void score_tiles(Scratch& s, const float* from, int64_t first, int64_t last, int64_t row, int64_t rows) const {
    alignas(64) float dot[SUMS * SIDE * SIDE], var[SUMS * SIDE * SIDE];
    const int64_t width = (int64_t)s.listed.size() * BLOCK, size = 3 * part;
    const uint16_t *q = &s.parts[row * size], *square = q + part, *left = square + part;
    const float scale = (float)g.scale, widen_by = std::abs(scale);
    for (int64_t at = first; at < last; ++at) {
      const float* block = from + s.listed[at] * block_size;
      const uint16_t *mean = reinterpret_cast<const uint16_t*>(block), *spread = mean + 2 * part * SIDE;
      auto four = [&](const uint16_t* rows_of, const uint16_t* columns) {  // 2 times 16 rows by 2 times 16 columns
        const uint16_t *others = rows_of + SIDE * size, *beside = columns + 4 * part * SIDE;
        return Factors{{rows_of, rows_of, others, others}, {columns, beside, columns, beside}};
      };
      tile_sums<SUMS>(dot, size, steps, {four(q, mean), four(q, mean + part * SIDE)});
      tile_sums<SUMS>(var, size, steps, {four(square, spread), four(left, spread), four(square, spread + part * SIDE)});
      for (int64_t c = 0; c < BLOCK; c += L) {
        const vec bias = load(block + block_size - BLOCK + c);
        const ivec empty = bias == NEG_INF;
        for (int64_t i = 0; i < std::min(rows - row, 2 * SIDE); ++i) {
          const int64_t from_tile = (i / SIDE * 2 + c / SIDE) * SIDE * SIDE + i % SIDE * SIDE + c % SIDE;
          const vec score = load(dot + from_tile) * scale + root(load(var + from_tile)) * widen_by + bias;
          istore(&s.rank[(row + i) * width + at * BLOCK + c], empty ? isplat(LOWEST_RANK) : rank_of(score));
        }
      }
    }
  }

  // A row's query, filled up with zeros, and its square, which two numbers of bfloat16 hold.
  void read_parts(const View& from, int64_t b, int64_t h, int64_t n, uint16_t* to) const {
    std::memcpy(to, (const uint16_t*)from.data + offset(from, b, h, n), g.dim * sizeof(uint16_t));
    std::fill(to + g.dim, to + part, 0);
    for (int64_t d = 0; d < part; d += L) {
      const vec q = load_narrow(to + d), square = q * q;
      store_narrow(to + part + d, square);
      store_narrow(to + 2 * part + d, square - load_narrow(to + part + d));
    }
  }

  void score(Scratch& s, const float* from, int64_t rows) const {
    const int64_t count = s.listed.size();
    s.rank.resize(rows * count * BLOCK);
    for (int64_t at = 0; at < count; at += STEP) {
      const int64_t last = std::min(at + STEP, count);
      if (!narrow) by_groups<GROUP>(rows, Score{*this, s, from, at, last});
      for (int64_t row = 0; narrow && row < rows; row += 2 * SIDE) score_tiles(s, from, at, last, row, rows);
    }
  }

  // What a query's ranks must be above: the least share of its softmax, if one is asked for.
  int32_t bar_of(const int32_t* rank, int64_t count, const float* mass) const {
    if (!(g.log_share > NEG_INF)) return LOWEST_RANK;
    const float least = log_sum(rank, count, *mass) + (float)g.log_share;
    return least > NEG_INF ? rank_of(splat(least))[0] - 1 : LOWEST_RANK;  // NaN hides nothing
  }

  // The same of heads together; `heard` of them count.
  int32_t bar_together(const int32_t* rank, int64_t count, float heard) const {
    if (!(g.log_share > NEG_INF)) return LOWEST_RANK;
    return rank_of(splat((sum_of(rank, count) + heard) * (float)std::exp(g.log_share)))[0] - 1;
  }

  // The routes of a tile's rows; `mass`: of each row, or null.
  void run_tile(Scratch& s, const Span& span, int64_t b, int64_t kv, const Entries<const float>& mass,
                const Entries<int32_t>& routes) const {
    const int64_t length = span.end - span.begin, rows = length * (g.heads / g.kv_heads);
    const int64_t step = std::max<int64_t>((narrow ? NARROW_ROWS : ROWS) / heads, 1) * heads;
    for (int64_t first = 0; first < rows; first += step) {
      s.row.clear();
      // Rows of the tile, one head's after another's, or one query's where its heads route together.
      for (int64_t i = first; i < std::min(first + step, rows); ++i)
        s.row.push_back(heads == 1 ? i : i % heads * length + i / heads);
      run_rows(s, span, b, kv, mass, routes);
    }
  }

  void run_rows(Scratch& s, const Span& span, int64_t b, int64_t kv, const Entries<const float>& mass,
                const Entries<int32_t>& routes) const {
    const int64_t group = g.heads / g.kv_heads, head = b * g.kv_heads + kv - packed_from;
    const int64_t length = span.end - span.begin, rows = s.row.size();
    s.mass.resize(rows);
    if (narrow) {
      s.parts.resize((rows + 2 * SIDE - 1) / (2 * SIDE) * 2 * SIDE * 3 * part);
    } else {
      s.query.resize(rows * g.dim);
      s.square.resize(rows * g.dim);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = kv * group + s.row[r] / length, n = span.begin + s.row[r] % length;
      if (mass.data) s.mass[r] = *mass(s.row[r]);
      if (narrow) {
        read_parts(query, b, h, n, &s.parts[r * 3 * part]);
        continue;
      }
      float* q = &s.query[r * g.dim];
      read(query, b, h, n, g.dim, q);
      for (int64_t d = 0; d < g.dim; ++d) {
        q[d] *= (float)g.scale;
        s.square[r * g.dim + d] = q[d] * q[d];
      }
    }
    // Chunks outside the window: below `low` and from `after` on.
    const int64_t low = span.low / g.chunk, after = g.causal ? chunks : (span.high + g.chunk - 1) / g.chunk;
    const int64_t end = g.causal ? low : chunks;
    if (g.coarse) choose_chunks(s, &level[head * blocks_of(chunks) * block_size], rows, low, after, end);
    s.listed.clear();
    for (int64_t block = 0; block < blocks_of(end * per_chunk); ++block)
      if (!g.coarse || any_wanted(s, block, end)) s.listed.push_back(block);
    score(s, &clusters[head * blocks_of(chunks * per_chunk) * block_size], rows);
    const int64_t width = (int64_t)s.listed.size() * BLOCK;
    for (int64_t r = 0; r < rows; r += heads) {
      int32_t* rank = s.rank.data() + r * width;
      const float heard = heads > 1 ? prescore::together(rank, width, heads, &s.mass[r]) : 0.0f;
      if (g.coarse)
        hide_others(s, rank, r);
      else
        hide(rank, low * per_chunk, std::min(after * per_chunk, width));
      const int32_t bar = heads > 1 ? bar_together(rank, width, heard) : bar_of(rank, width, &s.mass[r]);
      int32_t* out = routes(s.row[r]);
      s.chooser.choose(rank, width, g.routes, out, bar);
      if (g.coarse)
        for (int64_t i = 0; i < g.routes && out[i] >= 0; ++i) out[i] = s.listed[out[i] / BLOCK] * BLOCK + out[i] % BLOCK;
      for (int64_t h = 1; h < heads; ++h) std::copy_n(out, g.routes, routes(s.row[r + h]));
    }
  }

  static void hide(int32_t* rank, int64_t from, int64_t to) {
    if (from < to) std::fill(rank + from, rank + to, LOWEST_RANK);
  }

  // The `coarse` best chunks of each row, and which chunks that makes.
  void choose_chunks(Scratch& s, const float* from, int64_t rows, int64_t low, int64_t after, int64_t end) const {
    s.listed.resize(blocks_of(end));
    for (size_t block = 0; block < s.listed.size(); ++block) s.listed[block] = block;
    score(s, from, rows);
    const int64_t width = (int64_t)s.listed.size() * BLOCK;
    s.chosen.resize(rows * g.coarse);
    s.wanted.assign(chunks, 0);
    for (int64_t r = 0; r < rows; r += heads) {
      int32_t *rank = s.rank.data() + r * width, *chosen = &s.chosen[r * g.coarse];
      if (heads > 1) prescore::together(rank, width, heads, &s.mass[r]);
      hide(rank, low, std::min(after, width));
      s.chooser.choose(rank, width, g.coarse, chosen, LOWEST_RANK);
      for (int64_t i = 0; i < g.coarse && chosen[i] >= 0; ++i) s.wanted[chosen[i]] = 1;
    }
  }

  bool any_wanted(const Scratch& s, int64_t block, int64_t end) const {
    for (int64_t chunk = block * BLOCK / per_chunk; chunk < end && chunk * per_chunk < (block + 1) * BLOCK; ++chunk)
      if (s.wanted[chunk]) return true;
    return false;
  }

  // Ranks of clusters whose chunk the row did not choose.
  void hide_others(const Scratch& s, int32_t* rank, int64_t r) const {
    const int32_t* next = &s.chosen[r * g.coarse];
    const int32_t* last = next + g.coarse;
    for (size_t at = 0; at < s.listed.size(); ++at) {
      const int64_t first = s.listed[at] * BLOCK;  // of its clusters
      for (int64_t c = first; c < first + BLOCK;) {
        const int64_t chunk = c / per_chunk, end = std::min((chunk + 1) * per_chunk, first + BLOCK);
        while (next < last && *next >= 0 && *next < chunk) ++next;
        if (next == last || *next != chunk) hide(rank, at * BLOCK + c - first, at * BLOCK + end - first);
        c = end;
      }
    }
  }
};

// The routes of all queries, [batch, head, query, routes]; `mass` [batch, head, query], or null.
struct RouteAll {
  const Route& route;
  const float* mass;
  int32_t* routes;

  struct Scratch {
    Tiles tiles;
    Route::Scratch route;
  };
  Scratch scratch() const { return {Tiles(route.narrow)}; }
  void run(int64_t task, Scratch& s) const {
    const Geometry& g = route.g;
    const int64_t count = route.tiles.size(), bh = task / count, b = bh / g.kv_heads, kv = bh % g.kv_heads;
    const Span& span = route.tiles[task % count];
    route.run_tile(s.route, span, b, kv, entries(mass, g, span, b, kv, 1), entries(routes, g, span, b, kv, g.routes));
  }
};

}  // namespace prescore
