// The best few of many scores, as ranks: integers in the order of the scores.

#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace prescore {

constexpr int32_t TOP_RANK = 0x7fffffff;

// Float order as integer order; NaN above all, so that what is not finite is met.
inline ivec rank_of(vec x) {
  const ivec as_bits = (ivec)x;
  const ivec key = as_bits ^ ((as_bits >> 31) & 0x7fffffff);
  return x == x ? key : isplat(TOP_RANK);
}

constexpr int32_t LOWEST_RANK = (int32_t)0x807fffff;   // of -inf: what may not be chosen
constexpr int32_t INFINITE_RANK = (int32_t)0x7f800000;  // of +inf

inline vec score_of(ivec rank) { return (vec)(rank ^ ((rank >> 31) & 0x7fffffff)); }

// Natural logarithm of exp(base) + sum exp(score) over `count` ranks (whole vectors); NaN counts as +inf.
inline float log_sum(const int32_t* from, int64_t count, float base) {
  ivec best = isplat(LOWEST_RANK);
  for (int64_t c = 0; c < count; c += L) {
    const ivec r = iload(from + c);
    best = r > best ? r : best;
  }
  int32_t most = LOWEST_RANK;
  for (int i = 0; i < L; ++i) most = std::max<int32_t>(most, best[i]);
  if (most >= INFINITE_RANK) return base != base ? base : std::numeric_limits<float>::infinity();
  const float highest = score_of(isplat(most))[0], top = highest > base ? highest : base;
  if (!(top > NEG_INF) || top == std::numeric_limits<float>::infinity()) return top;
  vec total = {};
  for (int64_t c = 0; c < count; c += L)
    total += exp2_vec((score_of(iload(from + c)) - top) * (float)LOG2_E);
  return top + std::log(sum_lanes(total) + std::exp(base - top));
}

constexpr float MOST_GAIN = 70.0f;  // routing.MOST_GAIN

// The scores of a query's `heads`, whose ranks lie `count` apart, as one, in place of the first's ranks;
// routing.together, but for the logarithm. `mass`: of each head. Returns how many heads' masses are finite.
inline float together(int32_t* rank, int64_t count, int64_t heads, const float* mass) {
  const float infinite = std::numeric_limits<float>::infinity();
  float heard = 0.0f;
  for (int64_t h = 0; h < heads; ++h) heard += std::abs(mass[h]) < infinite;
  for (int64_t c = 0; c < count; c += L) {
    vec total = {};
    for (int64_t h = 0; h < heads; ++h) {
      if (!(mass[h] < infinite)) continue;
      const ivec r = iload(rank + h * count + c);
      const vec gain = score_of(r) - (mass[h] > -infinite ? mass[h] : 0.0f);
      const vec grown = exp2_vec((gain < MOST_GAIN ? gain : splat(MOST_GAIN)) * (float)LOG2_E);  // NaN: the most
      total += r == LOWEST_RANK ? vec{} : grown;
    }
    istore(rank + c, total == 0.0f ? isplat(LOWEST_RANK) : rank_of(total));
  }
  return heard;
}

// Sum of what `count` ranks (whole vectors) stand for, but for the lowest.
inline float sum_of(const int32_t* from, int64_t count) {
  vec total = {};
  for (int64_t c = 0; c < count; c += L) {
    const ivec r = iload(from + c);
    total += r == LOWEST_RANK ? vec{} : score_of(r);
  }
  return sum_lanes(total);
}

struct Chooser {
  std::vector<int32_t> best, rank, place;

  static int64_t above(const int32_t* rank, int64_t count, int32_t bar) {
    ivec hits = {};
    for (int64_t c = 0; c < count; c += L) hits -= iload(rank + c) > bar;
    return sum_lanes(hits);
  }

  // The smallest bar with at most `want` ranks above it, or any with `want` to `enough`. More than
  // `want` are above LOWEST_RANK. By bisection on the integers.
  static int32_t bar_of(const int32_t* rank, int64_t count, int64_t want, int64_t enough) {
    ivec least = isplat(TOP_RANK), most = isplat(LOWEST_RANK);
    for (int64_t c = 0; c < count; c += L) {
      const ivec r = iload(rank + c), real = r > LOWEST_RANK ? r : isplat(TOP_RANK);
      least = real < least ? real : least;
      most = r > most ? r : most;
    }
    int64_t low = TOP_RANK, bar = LOWEST_RANK;
    for (int i = 0; i < L; ++i) {
      low = std::min<int64_t>(low, (int64_t)least[i] - 1);
      bar = std::max<int64_t>(bar, most[i]);
    }
    while (low + 1 < bar) {
      const int64_t middle = (low + bar) / 2, n = above(rank, count, (int32_t)middle);
      if (n >= want && n <= enough) return (int32_t)middle;
      (n > want ? low : bar) = middle;
    }
    return (int32_t)bar;
  }

  // Ranks above the bar and their places, ascending; padded to whole vectors. Returns their number.
  int64_t collect(const int32_t* from, int64_t count, int32_t bar) {
    rank.resize(count + L);
    place.resize(count + L);
    int64_t taken = 0;
#if defined(__AVX512F__)
    for (int64_t c = 0; c < count; c += L) {
      const ivec r = iload(from + c);
      const __mmask16 found = (__mmask16)bits(r > bar);
      istore(&rank[taken], (ivec)_mm512_maskz_compress_epi32(found, (__m512i)r));
      istore(&place[taken], (ivec)_mm512_maskz_compress_epi32(found, (__m512i)(iota() + (int32_t)c)));
      taken += __builtin_popcount(found);
    }
#else
    for (int64_t c = 0; c < count; c += L)
      for (uint32_t found = bits(iload(from + c) > bar); found; found &= found - 1) {
        const int64_t at = c + __builtin_ctz(found);
        rank[taken] = from[at];
        place[taken++] = (int32_t)at;
      }
#endif
    std::fill_n(&rank[taken], L, LOWEST_RANK);
    return taken;
  }

  // The places of the `want` best of `count` ranks (whole vectors) above `bar`, ascending, then -1; LOWEST_RANK
  // is never chosen, ties go to the earlier.
  //
  // Among the maxima of GROUP vectors, lane by lane, `want` above a bar mean that at least so many
  // ranks are, and hardly any rank that is not among the best is: only those are looked at closely.
  void choose(const int32_t* from, int64_t count, int64_t want, int32_t* out, int32_t bar) {
    constexpr int64_t GROUP = 4;
    if (count >= 4 * GROUP * want && (bar == LOWEST_RANK || above(from, count, bar) > want)) {
      const int64_t groups = count / (GROUP * L);
      best.resize(groups * L);
      for (int64_t group = 0; group < groups; ++group) {
        ivec most = iload(from + group * GROUP * L);
        for (int64_t i = 1; i < GROUP; ++i) {
          const ivec r = iload(from + (group * GROUP + i) * L);
          most = r > most ? r : most;
        }
        istore(&best[group * L], most);
      }
      if (above(best.data(), groups * L, LOWEST_RANK) > want)
        bar = std::max(bar, bar_of(best.data(), groups * L, want, want + want / 4) - 1);
    }
    const int64_t candidates = collect(from, count, bar);
    int64_t taken = 0;
    if (candidates <= want) {
      for (; taken < candidates; ++taken) out[taken] = place[taken];
    } else {
      const int64_t padded = (candidates + L - 1) / L * L;
      const int32_t line = bar_of(rank.data(), padded, want, want);
      int64_t ties = want - above(rank.data(), padded, line);
      for (int64_t i = 0; taken < want; ++i) {
        const bool tie = rank[i] == line && ties > 0;
        ties -= tie;
        if (rank[i] > line || tie) out[taken++] = place[i];
      }
    }
    for (; taken < want; ++taken) out[taken] = -1;
  }
};

}  // namespace prescore
