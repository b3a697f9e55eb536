// How keys and values lie in blocks of 16, and how rows attend blocks: `Wide`, in float32, for vectors; `Narrow`, in
// bfloat16, for tiles. A block's lanes without a key are zero.
//
// A layout's AT_ONCE: blocks that it attends at once best, if the same rows do.

#pragma once

#include "simd.h"
#include "site.h"
#include "softmax.h"
#include "tiles.h"

namespace prescore {

struct Packed {
  uint32_t lanes;  // that have a key
  bool finite;     // whether values are
};

// Keys [dim][16], values [16][width].
struct Wide {
  using Number = float;
  using Scratch = std::vector<float>;
  static constexpr int AT_ONCE = 1;
  static int64_t key_size(int64_t dim) { return dim * W; }

  static void reserve(Rows& rows, int64_t count) { rows.query.resize(count * rows.dim); }

  static void read_query(Rows& rows, int64_t r, const View& query, int64_t b, int64_t h, int64_t n) {
    float* q = &rows.query[r * rows.dim];
    read(query, b, h, n, rows.dim, q);
    for (int64_t d = 0; d < rows.dim; ++d) q[d] *= rows.rate;
  }

  template <typename Index>
  static Packed pack(Index index, const View& key, const View& value, int64_t b, int64_t h, const Geometry& g,
                     int64_t width, Scratch& rowwise, float* key_out, float* value_out) {
    Packed packed{0, true};
    rowwise.resize(W * g.dim);
    vec taint = {};
    for (int j = 0; j < W; ++j) {
      const int64_t at = index(j);
      float* v = value_out + j * width;
      if (at < 0) {
        std::fill_n(&rowwise[j * g.dim], g.dim, 0.0f);
        std::fill_n(v, width, 0.0f);
        continue;
      }
      packed.lanes |= 1u << j;
      read(key, b, h, at, g.dim, &rowwise[j * g.dim]);
      read(value, b, h, at, g.value_dim, v);
      std::fill(v + g.value_dim, v + width, 0.0f);
      for (int64_t c = 0; c < width; c += L) taint += load(v + c) * 0.0f;
    }
    for (int64_t d = 0; d < g.dim; ++d)
      for (int j = 0; j < W; ++j) key_out[d * W + j] = rowwise[j * g.dim + d];
    packed.finite = sum_lanes(taint) == 0.0f;
    return packed;
  }

  // Lane `lane` of a block: `share` times the sum of the keys of `blocks` blocks, and of the values.
  static void average(const float* key, const float* value, int64_t blocks, float share, int64_t dim, int64_t width,
                      float* to_key, float* to_value, int64_t lane) {
    for (int64_t d = 0; d < dim; ++d) {
      vec sum = {};
      for (int64_t b = 0; b < blocks; ++b)
        for (int j = 0; j < W; j += L) sum += load(&key[(b * dim + d) * W + j]);
      to_key[d * W + lane] = sum_lanes(sum) * share;
    }
    for (int64_t c = 0; c < width; c += L) {
      vec sum = {};
      for (int64_t j = 0; j < blocks * W; ++j) sum += load(&value[j * width + c]);
      store(&to_value[lane * width + c], sum * share);
    }
  }

  static bool finite(const float* value, int64_t width) {
    vec taint = {};
    for (int64_t c = 0; c < W * width; c += L) taint += load(value + c) * 0.0f;
    return sum_lanes(taint) == 0.0f;
  }

  // Not inlined: its many forms would be compiled wherever it is called.
  __attribute__((noinline)) static void attend(Rows& rows, const int32_t* listed, int64_t count,
                                               const Block<float>* blocks, int64_t number) {
    for (int64_t b = 0; b < number; ++b) by_groups<LOGIT_ROWS>(count, AttendBlock{rows, listed, blocks[b]});
  }
};

// Keys [dim / 32][16 pairs of features][16][2], features rounded up to 32; values [width / 16][8 pairs of keys][16][2].
struct Narrow {
  using Number = uint16_t;
  using Scratch = std::vector<uint16_t>;  // zeros, in place of a key that is none
  static constexpr int AT_ONCE = 4;
  static int64_t steps(int64_t dim) { return (dim + STEP_OF - 1) / STEP_OF; }
  static int64_t key_size(int64_t dim) { return steps(dim) * STEP_OF * W; }

  static bool finite(uint16_t x) { return (x & 0x7f80) != 0x7f80; }
  static vec first(ivec pairs) { return (vec)(pairs << 16); }
  static vec second(ivec pairs) { return (vec)(pairs & (int32_t)0xffff0000); }
  static ivec pairs(const uint16_t* p) { return iload(reinterpret_cast<const int32_t*>(p)); }

  static void reserve(Rows& rows, int64_t count) { rows.narrow.resize(count * steps(rows.dim) * STEP_OF); }

  static void read_query(Rows& rows, int64_t r, const View& query, int64_t b, int64_t h, int64_t n) {
    const int64_t row = steps(rows.dim) * STEP_OF;
    uint16_t* q = &rows.narrow[r * row];
    std::memcpy(q, (const uint16_t*)query.data + offset(query, b, h, n), rows.dim * sizeof(uint16_t));
    std::fill(q + rows.dim, q + row, 0);
  }

  // 32 features of 16 keys as 16 pairs; of the last ones `count`, then zeros.
  static void interleave(const uint16_t* const* keys, int64_t first, int64_t count, uint16_t* to) {
#if defined(__AVX512BW__)
    __m512i row[W];
    for (int j = 0; j < W; ++j) row[j] = _mm512_maskz_loadu_epi16((__mmask32)(~0u >> (STEP_OF - count)), keys[j] + first);
#pragma GCC unroll 4
    for (int by = W / 2; by; by /= 2) {  // a transpose: swap what is off the diagonal of ever smaller squares
      const ivec moved = iota() & by;
      const __m512i low = (__m512i)(moved != 0 ? iota() + (W - by) : iota());
      const __m512i high = (__m512i)(moved != 0 ? iota() + W : iota() + by);
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) {
        if (j & by) continue;
        const __m512i a = row[j], b = row[j + by];
        row[j] = _mm512_permutex2var_epi32(a, low, b);
        row[j + by] = _mm512_permutex2var_epi32(a, high, b);
      }
    }
    for (int pair = 0; pair < W; ++pair) _mm512_storeu_si512(to + pair * 2 * W, row[pair]);
#else
    for (int64_t d = 0; d < STEP_OF; ++d)
      for (int j = 0; j < W; ++j) to[(d / 2 * W + j) * 2 + d % 2] = d < count ? keys[j][first + d] : 0;
#endif
  }

  // 16 features of two values as pairs; of the last ones `count`, then zeros. Whether all are finite.
  static bool zip(const uint16_t* a, const uint16_t* b, int64_t count, uint16_t* to) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 mask = (__mmask16)(0xffffu >> (W - count));
    const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, a));
    const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, b));
    const __m512i both = _mm512_or_si512(first, _mm512_slli_epi32(second, 16)), limit = _mm512_set1_epi16(0x7f80);
    _mm512_storeu_si512(to, both);
    return !_mm512_cmpeq_epi16_mask(_mm512_and_si512(both, limit), limit);
#else
    bool all = true;
    for (int64_t i = 0; i < W; ++i) {
      to[2 * i] = i < count ? a[i] : 0;
      to[2 * i + 1] = i < count ? b[i] : 0;
      all &= finite(to[2 * i]) & finite(to[2 * i + 1]);
    }
    return all;
#endif
  }

  template <typename Index>
  static Packed pack(Index index, const View& key, const View& value, int64_t b, int64_t h, const Geometry& g,
                     int64_t width, Scratch& zeros, uint16_t* key_out, uint16_t* value_out) {
    zeros.resize(std::max(g.dim, width));
    const uint16_t* none = zeros.data();
    const uint16_t *keys[W], *values[W];
    Packed packed{0, true};
    for (int j = 0; j < W; ++j) {
      const int64_t at = index(j);
      packed.lanes |= (uint32_t)(at >= 0) << j;
      keys[j] = at < 0 ? none : (const uint16_t*)key.data + offset(key, b, h, at);
      values[j] = at < 0 ? none : (const uint16_t*)value.data + offset(value, b, h, at);
    }
    for (int64_t d = 0; d < g.dim; d += STEP_OF) interleave(keys, d, std::min(g.dim - d, STEP_OF), key_out + d * W);
    bool all = true;
    for (int64_t c = 0; c < width; c += W)
      for (int j = 0; j < W; j += 2)
        all &= zip(values[j] + c, values[j + 1] + c, std::min<int64_t>(g.value_dim - c, W), value_out + c * W + j * W);
    packed.finite = all;
    return packed;
  }

  static void average(const uint16_t* key, const uint16_t* value, int64_t blocks, float share, int64_t dim,
                      int64_t width, uint16_t* to_key, uint16_t* to_value, int64_t lane) {
    for (int64_t pair = 0; pair < steps(dim) * SIDE; ++pair) {
      vec even = {}, odd = {};
      for (int64_t b = 0; b < blocks; ++b)
        for (int j = 0; j < W; j += L) {
          const ivec both = pairs(key + b * key_size(dim) + (pair * W + j) * 2);
          even += first(both);
          odd += second(both);
        }
      to_key[(pair * W + lane) * 2] = prescore::narrow(sum_lanes(even) * share);
      to_key[(pair * W + lane) * 2 + 1] = prescore::narrow(sum_lanes(odd) * share);
    }
    for (int64_t c = 0; c < width; c += W)
      for (int at = 0; at < W; at += L) {
        vec sum = {};
        for (int64_t b = 0; b < blocks; ++b)
          for (int j = 0; j < W; j += 2) {
            const ivec both = pairs(value + b * W * width + c * W + j * W + 2 * at);
            sum += first(both) + second(both);
          }
        for (int i = 0; i < L; ++i)
          to_value[c * W + (lane / 2 * W + at + i) * 2 + lane % 2] = prescore::narrow(sum[i] * share);
      }
  }

  static bool finite(const uint16_t* value, int64_t width) {
    bool all = true;
    for (int64_t i = 0; i < W * width; ++i) all &= finite(value[i]);
    return all;
  }

  static void attend(Rows& rows, const int32_t* listed, int64_t count, const Block<uint16_t>* blocks, int64_t number) {
    bool finite = true;
    for (int64_t b = 0; b < number; ++b) finite &= blocks[b].finite;
    if (!finite) return attend_apart(rows, listed, count, blocks, number);
    attend_finite(rows, listed, count, blocks, number);
  }

  static void attend_finite(Rows& rows, const int32_t* listed, int64_t count, const Block<uint16_t>* blocks,
                            int64_t number) {
    for (; number >= 4; number -= 4, blocks += 4) attend_blocks<4>(rows, listed, count, blocks);
    for (; number >= 2; number -= 2, blocks += 2) attend_blocks<2>(rows, listed, count, blocks);
    if (number) attend_blocks<1>(rows, listed, count, blocks);
  }

  template <int N>
  static void attend_blocks(Rows& rows, const int32_t* row, int64_t count, const Block<uint16_t>* blocks) {
    constexpr int64_t ROWS = SUMS / N * SIDE;
    rows.gathered.resize(ROWS * steps(rows.dim) * STEP_OF);
    rows.part.resize(ROWS * rows.width);
    for (int64_t at = 0; at < count; at += ROWS)
      attend_rows<N>(rows, row + at, std::min(count - at, ROWS), blocks, at);
  }

  // Some rows, whose masks begin at `first`.
  template <int N>
  static void attend_rows(Rows& rows, const int32_t* row, int64_t count, const Block<uint16_t>* blocks, int64_t first) {
    alignas(64) float logit[SUMS * SIDE * W];
    alignas(64) uint16_t weight[SUMS * SIDE * W];
    const int64_t size = steps(rows.dim) * STEP_OF, width = rows.width;
    Factors factors = {};
    int tiles = 0;
    for (int64_t i = 0; i < count; i += SIDE) {
      const uint16_t* query = &rows.narrow[row[i] * size];
      if (count - i < SIDE || row[i + SIDE - 1] - row[i] != SIDE - 1) {  // not 16 that follow each other
        uint16_t* to = &rows.gathered[i * size];
        query = to;
        for (int64_t at = i; at < std::min(i + SIDE, count); ++at)
          for (int64_t c = 0; c < size; c += STEP_OF, to += STEP_OF)
            std::memcpy(to, &rows.narrow[row[at] * size + c], STEP_OF * sizeof(uint16_t));
      }
      for (int b = 0; b < N; ++b, ++tiles) {
        factors.row[tiles] = query;
        factors.column[tiles] = blocks[b].key;
      }
    }
    tile_sums(logit, size, steps(rows.dim), {factors}, tiles);
    for (int64_t i = 0; i < count; ++i) {
      uint32_t mask[N];
      for (int b = 0; b < N; ++b) mask[b] = blocks[b].mask[first + i];
      weigh<N>(rows, row[i], mask, blocks, logit + (i / SIDE * N * SIDE + i % SIDE) * W, weight + i * N * W);
    }
    if (!width) return;
    const uint16_t* values[N];
    for (int b = 0; b < N; ++b) values[b] = blocks[b].value;
    float *part = rows.part.data(), *out = rows.out.data();
    for (int64_t i = 0; i < count; i += SIDE) tile_values<N>(weight + i * N * W, values, width, part + i * width);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0, to = row[i] * width; c < width; c += L)
        store(out + to + c, load(out + to + c) + load(part + i * width + c));
  }

  // A row's weights of the keys of `mask`, from its products with them, of each block 16 * 16 behind the last's.
  template <int N>
  static void weigh(Rows& rows, int32_t row, const uint32_t* mask, const Block<uint16_t>* blocks, const float* product,
                    uint16_t* weight) {
    vec s[N][V], best = splat(NEG_INF);
    float top = rows.top[row];
    for (int b = 0; b < N; ++b)
      for (int v = 0; v < V; ++v) {
        vec x = load(product + b * SIDE * W + v * L) * rows.rate;
        if (rows.softcap.most > 0.0f) x = rows.softcap(x);
        if (blocks[b].bias) x += load(blocks[b].bias + v * L);
        s[b][v] = choose(mask[b] >> v * L, x, splat(NEG_INF));
        best = larger(best, s[b][v]);
      }
    if (__builtin_expect(bits(best > top + SLACK) != 0, 0)) {
      rows.raise(row, max_lane(best));
      top = rows.top[row];
    }
    if (!(top > NEG_INF)) top = 0.0f;
    float* sum = &rows.total[row * L];
    vec total = load(sum);
    for (int b = 0; b < N; ++b)
      for (int v = 0; v < V; ++v) {
        const vec p = choose(mask[b] >> v * L, exp2_rough(s[b][v] - top), vec{});
        store_narrow(weight + b * W + v * L, p);
        total += p;
      }
    store(sum, total);
  }

  // A value that is not finite must reach only the rows that attend it, and change nothing for the others: they have
  // products of tiles as ever, where zeros stand for it.
  static void attend_apart(Rows& rows, const int32_t* listed, int64_t count, const Block<uint16_t>* blocks,
                           int64_t number) {
    const int64_t size = W * rows.width;
    std::vector<uint32_t> bad(number, 0);
    std::vector<uint16_t> zeroed;
    for (int64_t b = 0; b < number; ++b) {
      zeroed.insert(zeroed.end(), blocks[b].value, blocks[b].value + size);
      for (int64_t j = 0; j < W; ++j)
        for (int64_t c = 0; c < rows.width; ++c) bad[b] |= (uint32_t)!finite(blocks[b].value[place(c, j)]) << j;
      for (int64_t j = 0; j < W; ++j)
        for (int64_t c = 0; c < rows.width; ++c)
          if (bad[b] >> j & 1) zeroed[b * size + place(c, j)] = 0;
    }
    for (const bool reached : {false, true}) {
      std::vector<int32_t> part;
      std::vector<std::vector<uint16_t>> masks(number);
      for (int64_t i = 0; i < count; ++i) {
        uint32_t seen = 0;
        for (int64_t b = 0; b < number; ++b) seen |= blocks[b].mask[i] & bad[b];
        if ((seen != 0) != reached) continue;
        part.push_back(listed[i]);
        for (int64_t b = 0; b < number; ++b) masks[b].push_back(blocks[b].mask[i]);
      }
      std::vector<Block<uint16_t>> own(blocks, blocks + number);
      for (int64_t b = 0; b < number; ++b) own[b].mask = masks[b].data();
      if (reached) return attend_wide(rows, part.data(), part.size(), own.data(), number);
      for (int64_t b = 0; b < number; ++b) own[b].value = &zeroed[b * size];
      attend_finite(rows, part.data(), part.size(), own.data(), number);
    }
  }

  // Where feature c of the value of key j is in a block.
  static int64_t place(int64_t c, int64_t j) { return c / W * W * W + (j / 2 * W + c % W) * 2 + j % 2; }

  // Row by row, in float32.
  static void attend_wide(Rows& rows, const int32_t* listed, int64_t count, const Block<uint16_t>* blocks,
                          int64_t number) {
    const int64_t size = steps(rows.dim) * STEP_OF;
    std::vector<float> key(rows.dim * W), value(W * rows.width);
    Wide::reserve(rows, rows.top.size());
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < rows.dim; ++d)
        rows.query[listed[i] * rows.dim + d] = widen(rows.narrow[listed[i] * size + d]) * rows.rate;
    for (const Block<uint16_t>* b = blocks; b < blocks + number; ++b) {
      for (int64_t d = 0; d < rows.dim; ++d)
        for (int j = 0; j < W; ++j) key[d * W + j] = widen(b->key[(d / 2 * W + j) * 2 + d % 2]);
      for (int j = 0; j < W; ++j)
        for (int64_t c = 0; c < rows.width; ++c)
          value[j * rows.width + c] = widen(b->value[place(c, j)]);
      const Block<float> wide{key.data(), value.data(), b->bias, b->finite, b->mask};
      Wide::attend(rows, listed, count, &wide, 1);
    }
  }
};

}  // namespace prescore
