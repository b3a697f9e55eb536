// Routing: which clusters a query attends; reference.route says what is computed.

#pragma once

#include "choose.h"
#include "simd.h"
#include "site.h"

namespace prescore {

struct Route {
  const Geometry& g;
  View query;
  const float *mean, *spread, *bias, *mass;  // mass: [batch, head, query], or null
  int32_t* routes;

  static constexpr int V = 2, BLOCK = V * L;          // clusters scored at once
  static constexpr int GROUP = L == 4 ? 6 : L == 8 ? 6 : 12;  // rows scored at once: the registers there are
  static constexpr int64_t ROWS = 48;                 // rows whose ranks stay in cache until they are chosen from
  static constexpr int64_t STEP = 4;                  // blocks that stay in cache while the rows pass over them

  std::vector<Span> tiles = spans(g);
  int64_t clusters = (g.k_len + g.chunk - 1) / g.chunk * (g.chunk / g.cluster);
  int64_t blocks = (clusters + BLOCK - 1) / BLOCK, block_size = (2 * g.dim + 1) * BLOCK;
  // Per KV head and block: mean [dim][BLOCK], spread [dim][BLOCK], bias [BLOCK].
  std::vector<float> packed = pack();

  std::vector<float> pack() const {
    std::vector<float> to(g.batch * g.kv_heads * blocks * block_size);
    for (int64_t bh = 0; bh < g.batch * g.kv_heads; ++bh)
      for (int64_t c = 0; c < blocks * BLOCK; ++c) {
        float* block = &to[(bh * blocks + c / BLOCK) * block_size + c % BLOCK];
        block[2 * g.dim * BLOCK] = c < clusters ? bias[bh * clusters + c] : NEG_INF;
        for (int64_t d = 0; c < clusters && d < g.dim; ++d) {
          block[d * BLOCK] = mean[(bh * clusters + c) * g.dim + d];
          block[(g.dim + d) * BLOCK] = spread[(bh * clusters + c) * g.dim + d];
        }
      }
    return to;
  }

  struct Scratch {
    std::vector<float> query, square;
    std::vector<int32_t> rank;
    Chooser chooser;
  };
  Scratch scratch() const { return {}; }

  // Ranks of N rows against the blocks [first, last).
  struct Score {
    const Route& r;
    Scratch& s;
    const float* from;
    int64_t first, last;

    // Inlined into all that surrounds it, GCC keeps too few of the sums in registers: half the speed.
    template <int N>
    __attribute__((noinline)) void run(int64_t row) const {
      const int64_t dim = r.g.dim;
      const float *q[N], *square[N];
      for (int i = 0; i < N; ++i) {
        q[i] = &s.query[(row + i) * dim];
        square[i] = &s.square[(row + i) * dim];
      }
      for (int64_t block = first; block < last; ++block) {
        const float* m = from + block * r.block_size;
        vec dot[N][V], var[N][V];
        products<N, V>(square, dim, m + dim * BLOCK, var);
        products<N, V>(q, dim, m, dot);
        for (int v = 0; v < V; ++v) {
          const vec bias = load(m + 2 * dim * BLOCK + v * L);
          const ivec empty = bias == NEG_INF;
          for (int i = 0; i < N; ++i) {
            // By choice, not by sum: -inf + NaN would let a cluster that is empty or not there win.
            const ivec rank = empty ? isplat(LOWEST_RANK) : rank_of(dot[i][v] + root(var[i][v]) + bias);
            istore(&s.rank[(row + i) * r.blocks * BLOCK + block * BLOCK + v * L], rank);
          }
        }
      }
    }
  };

  // What a query's ranks must be above: the least share of its softmax, if one is asked for.
  int32_t bar_of(const int32_t* rank, int64_t count, int64_t at) const {
    if (!mass) return LOWEST_RANK;
    const float least = log_sum(rank, count, mass[at]) + (float)g.log_share;
    return least > NEG_INF ? rank_of(splat(least))[0] - 1 : LOWEST_RANK;  // NaN hides nothing
  }

  void run(int64_t task, Scratch& s) const {
    const Span span = tiles[task % tiles.size()];
    const int64_t bh = task / tiles.size(), b = bh / g.kv_heads, kv = bh % g.kv_heads;
    const int64_t group = g.heads / g.kv_heads, length = span.end - span.begin, rows = length * group;
    s.query.resize(ROWS * g.dim);
    s.square.resize(ROWS * g.dim);
    s.rank.resize(ROWS * blocks * BLOCK);
    for (int64_t first = 0; first < rows; first += ROWS)
      run_rows(s, span, b, kv, first, std::min(ROWS, rows - first), length);
  }

  void run_rows(Scratch& s, const Span& span, int64_t b, int64_t kv, int64_t first, int64_t rows,
                int64_t length) const {
    const int64_t group = g.heads / g.kv_heads, per_chunk = g.chunk / g.cluster;
    auto head = [&](int64_t r) { return kv * group + (first + r) / length; };
    auto position = [&](int64_t r) { return span.begin + (first + r) % length; };
    for (int64_t r = 0; r < rows; ++r) {
      float* q = &s.query[r * g.dim];
      read(query, b, head(r), position(r), g.dim, q);
      for (int64_t d = 0; d < g.dim; ++d) {
        q[d] *= (float)g.scale;
        s.square[r * g.dim + d] = q[d] * q[d];
      }
    }
    const int64_t low = span.low / g.chunk * per_chunk, eligible = g.causal ? low : clusters;
    const int64_t last = (eligible + BLOCK - 1) / BLOCK;
    const float* from = &packed[(b * g.kv_heads + kv) * blocks * block_size];
    for (int64_t block = 0; block < last; block += STEP)
      by_groups<GROUP>(rows, Score{*this, s, from, block, std::min(block + STEP, last)});
    const int64_t hole = g.causal ? last * BLOCK : (span.high + g.chunk - 1) / g.chunk * per_chunk;
    for (int64_t r = 0; r < rows; ++r) {
      int32_t* rank = &s.rank[r * blocks * BLOCK];
      for (int64_t c = low; c < std::min(hole, last * BLOCK); ++c) rank[c] = LOWEST_RANK;
      const int64_t at = (b * g.heads + head(r)) * g.q_len + position(r);
      s.chooser.choose(rank, last * BLOCK, g.routes, routes + at * g.routes, bar_of(rank, last * BLOCK, at));
    }
  }
};

}  // namespace prescore
