// What attend and its gradients read besides the query.

#pragma once

#include "allowed.h"
#include "site.h"

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

}  // namespace prescore
