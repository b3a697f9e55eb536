// A running softmax over blocks of 16 keys: the inner part of attend.

#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "simd.h"

namespace prescore {

constexpr int W = 16, V = W / L;  // keys a block, and vectors that hold one feature of them
constexpr uint16_t ALL = 0xffff;
// Rows at once, as the registers allow: of logits, and of sums of values, of COLUMNS vectors each.
constexpr int LOGIT_ROWS = L == 16 ? 12 : L == 8 ? 6 : 4;
constexpr int VALUE_ROWS = L == 16 ? 6 : LOGIT_ROWS;
constexpr int COLUMNS = L == 8 ? 2 : 4;
// A running maximum is raised only when a logit (in powers of two) passes it by this much.
constexpr float SLACK = 11.0f;

// Keys and values as a layout of blocks.h has them, `finite`: values are; logit biases in powers of two, or null; which
// lanes each row sees that attends the block.
template <typename Number>
struct Block {
  const Number* key;
  const Number* value;
  const float* bias;
  bool finite;
  const uint16_t* mask;
};

// c * tanh(x / c), of logits in powers of two; c 0: none.
struct Softcap {
  float most;

  explicit Softcap(double c) : most((float)(c * LOG2_E)) {}

  vec operator()(vec x) const { return tanh_vec(x / most) * most; }
};

// A learned sink's logit in powers of two, which is a finite number then.
inline float power_of_two(float logit) {
  const float most = std::numeric_limits<float>::max() / (float)LOG2_E;
  return std::min(std::max(logit, -most), most) * (float)LOG2_E;
}

// The rows of a tile. `width`: the value's features rounded up to 16; `rate`: what makes a product of query and key a
// logit in powers of two, which `query`, in float32, has been multiplied with, and `narrow`, in bfloat16, has not.
struct Rows {
  int64_t dim, width;
  float rate;
  Softcap softcap{0};
  std::vector<float> query, top, total, out, part;
  std::vector<uint16_t> narrow, gathered;

  void reset(int64_t rows, int64_t dim_, int64_t width_, double scale, double softcap_) {
    dim = dim_;
    width = width_;
    rate = (float)(scale * LOG2_E);
    softcap = Softcap(softcap_);
    top.assign(rows, NEG_INF);
    total.assign(rows * L, 0.0f);
    out.assign(rows * width, 0.0f);
  }

  // A logit that belongs to no key; -inf: none. One that is inf or NaN makes the sum NaN.
  void begin_with(int64_t row, float logit) {
    if (logit == NEG_INF) return;
    top[row] = power_of_two(logit);
    total[row * L] = 1.0f + 0.0f * logit;
  }

  // A row's maximum to `most`, if that passes it by more than the slack.
  void raise(int32_t at, float most) {
    float& highest = top[at];
    if (!(most > highest + SLACK)) return;
    if (highest > NEG_INF) {
      const float shrink = std::exp2(highest - most);
      store(&total[at * L], load(&total[at * L]) * shrink);
      float* row = &out[at * width];
      for (int64_t c = 0; c < width; c += L) store(row + c, load(row + c) * shrink);
    }
    highest = most;
  }
};

// Attend one block: row[i] sees the keys of b.mask[i].
struct AttendBlock {
  Rows& rows;
  const int32_t* row;
  const Block<float>& b;

  template <int N>
  void run(int64_t first) const {
    bool all = true;
    for (int i = 0; i < N; ++i) all &= b.mask[first + i] == ALL;
    if (all && !b.bias && b.finite)
      weigh_logits<N, true>(row + first, b.mask + first);
    else
      weigh_logits<N, false>(row + first, b.mask + first);
  }

  template <int N, bool PLAIN>
  void weigh_logits(const int32_t* at, const uint16_t* seen) const {
    const float* q[N];
    for (int i = 0; i < N; ++i) q[i] = &rows.query[at[i] * rows.dim];
    vec s[N][V];
    products<N, V>(q, rows.dim, b.key, s);
    if (rows.softcap.most > 0.0f)
      for (int i = 0; i < N; ++i)
        for (int v = 0; v < V; ++v) s[i][v] = rows.softcap(s[i][v]);
    if constexpr (!PLAIN)
      for (int i = 0; i < N; ++i)
        for (int v = 0; v < V; ++v) {
          if (b.bias) s[i][v] += load(b.bias + v * L);
          s[i][v] = choose(seen[i] >> v * L, s[i][v], splat(NEG_INF));
        }
    vec over = splat(NEG_INF);
    for (int i = 0; i < N; ++i)
      for (int v = 0; v < V; ++v) over = larger(over, s[i][v] - (rows.top[at[i]] + SLACK));
    if (bits(over > 0.0f))
      for (int i = 0; i < N; ++i) {
        vec best = splat(NEG_INF);
        for (int v = 0; v < V; ++v) best = larger(best, s[i][v]);
        rows.raise(at[i], max_lane(best));
      }
    alignas(64) float weight[N][W];
    for (int i = 0; i < N; ++i) {
      // With no finite logit yet (all NaN or none) any finite reference will do.
      const float top = rows.top[at[i]] > NEG_INF ? rows.top[at[i]] : 0.0f;
      vec total = load(&rows.total[at[i] * L]);
      for (int v = 0; v < V; ++v) {
        vec p = exp2_vec(s[i][v] - top);
        if constexpr (!PLAIN) p = choose(seen[i] >> v * L, p, vec{});
        store(&weight[i][v * L], p);
        total += p;
      }
      store(&rows.total[at[i] * L], total);
    }
    if (PLAIN || b.finite) {
      constexpr int HALF = N > VALUE_ROWS ? N / 2 : N;
      weigh_all<HALF>(at, weight);
      if constexpr (HALF < N) weigh_all<N - HALF>(at + HALF, weight + HALF);
    } else {
      for (int i = 0; i < N; ++i) weigh_one_by_one(at[i], weight[i], seen[i]);
    }
  }

  template <int N, int C>
  void weigh(const int32_t* at, const float (*weight)[W], int64_t column) const {
    vec acc[N][C];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[i][c] = load(&rows.out[at[i] * rows.width + column + c * L]);
    for (int j = 0; j < W; ++j) {
      vec v[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) v[c] = load(b.value + j * rows.width + column + c * L);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) acc[i][c] += v[c] * weight[i][j];
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) store(&rows.out[at[i] * rows.width + column + c * L], acc[i][c]);
  }

  template <int N>
  void weigh_all(const int32_t* at, const float (*weight)[W]) const {
    int64_t column = 0;
    for (; column + COLUMNS * L <= rows.width; column += COLUMNS * L) weigh<N, COLUMNS>(at, weight, column);
    for (; column < rows.width; column += L) weigh<N, 1>(at, weight, column);
  }

  // A value that is not finite must reach only the rows that attend it (0 * inf is NaN).
  void weigh_one_by_one(int32_t at, const float* weight, uint32_t seen) const {
    for (int j = 0; j < W; ++j)
      if (seen >> j & 1)
        for (int64_t c = 0; c < rows.width; c += L) {
          float* out = &rows.out[at * rows.width + c];
          store(out, load(out) + load(b.value + j * rows.width + c) * weight[j]);
        }
  }
};

}  // namespace prescore
