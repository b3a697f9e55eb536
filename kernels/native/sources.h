// What attend and its gradients read besides the query.

#pragma once

#include <algorithm>

#include "allowed.h"
#include "site.h"
#include "softmax.h"

namespace prescore {

struct Sources {
  View key, value;
  const uint8_t* valid;  // [batch, position] or null
  const int32_t *order, *routes, *row_index;  // routes: null where they are found tile by tile
  View row_key, row_value;
  const float* row_bias;
  const View* sink_logit;         // [batch, head, query, 1] or null
  const int64_t* band = nullptr;  // first and last key that each query may attend, [2, query]
  Allowed allowed = {};           // data null: as all else says
};

// Which keys of a tile's window each of its queries attends, as causality and a band say.
struct Reach {
  int64_t start, stop;  // of all its queries
  int64_t own;          // the first one's own key
  bool causal;
  const int64_t *first = nullptr, *last = nullptr;  // of each query, which never fall from one to the next; or null

  Reach(const Geometry& g, const Sources& from, const Span& span)
      : start(span.low), stop(span.high), own(span.begin + g.k_len - g.q_len), causal(g.causal) {
    const int64_t length = span.end - span.begin;
    if (causal) stop = std::min(stop, own + length);
    if (!from.band) return;
    first = from.band + span.begin;
    last = first + g.q_len;
    start = std::max(start, first[0]);
    stop = std::min(stop, last[length - 1] + 1);
  }

  // Whether every query attends the keys up to `to`.
  bool all_attend(int64_t to) const { return !first && (!causal || to <= own); }

  // The lanes of the block from `base` on that query `at` of the tile attends.
  uint32_t lanes(int64_t at, int64_t base) const {
    uint32_t found = ALL;
    if (causal) found &= between(0, own + at - base);
    if (first) found &= between(first[at] - base, last[at] - base);
    return found;
  }

  // Those from `from` to `to`, which may lie outside of a block.
  static uint32_t between(int64_t from, int64_t to) {
    if (from >= W || to < 0 || from > to) return 0;
    const uint32_t above = from <= 0 ? ALL : ALL << from & ALL;
    return to >= W - 1 ? above : above & ((2u << to) - 1);
  }
};

}  // namespace prescore
