"""What a cluster's score for a query is in the source of ``route``, of one query head or of all of a KV head.

Of one head it is the expected best logit (``routing.routing_scores``), and a share's bar is kept as a logarithm. Of
heads that route together (``routing.together``) it is what the cluster adds to the softmax's sum of each, in that of
its window and sinks, summed: a number of float32 without a logarithm, as each is at most e^70. The queries of a
head are read again in each step, so that a tile is 64 queries whatever the group; the network that finds the best is
then paid for once, not for each head.
"""

from __future__ import annotations

import math
from typing import Any

from ..routing import MOST_GAIN
from .render import fill
from .spec import Spec

LOG2E = math.log2(math.e)
FEATURES = 32
"""Of a part of them, in float32."""

# Of a tile of one head, the places fit 32 bits: they take half the registers.
READ_QUERIES = """
first = query + batch * query_b + of_one * query_h + first_query.to(tl.int64) * query_n  #? together
first = query + batch * query_b + (head * query_h + query_at.to(tl.int64) * query_n)[:, None]  #? not together
query_tile = tl.load(
    first + ((member * query_n)[:, None] + feature[None, :]),  #? together
    first + feature[None, :],  #? not together
    mask=live[:, None] & (feature < DIM)[None, :],
    other=0.0,
)
square_tile = query_tile * query_tile  #? exact
square_tile = (query_tile.to(tl.float32) * query_tile.to(tl.float32)).to(tl.bfloat16)  #? not exact
"""

READ_REPRESENTATIVES = """
where = at.to(tl.int64)[:, None] * DIM + feature[None, :]
inside = there[:, None] & (feature < DIM)[None, :]
mean_tile = tl.load(own_mean + where, mask=inside, other=0.0).to(tl.$dtype)
spread_tile = tl.load(own_spread + where, mask=inside, other=0.0).to(tl.$square_type)
"""

EXPECTED = """
score = tl.sqrt(tl.dot(square_tile$wide_type, tl.trans(spread_tile)$wide_type$precision))
score = tl.dot(query_tile$wide_type, tl.trans(mean_tile)$wide_type, score$precision) * scale
score += own[None, :]
$add_bias
"""

# As the factors of three TF32 passes, representatives of more features would not fit in shared memory.
EXPECTED_IN_PARTS = """
score = tl.zeros([ROWS, COLUMNS], tl.float32)
deviation = tl.zeros([ROWS, COLUMNS], tl.float32)
for begin_feature in range(0, DIM_TILE, $features):
    feature = begin_feature + tl.arange(0, $features)
    $read_queries
    $read_representatives
    deviation = tl.dot(square_tile, tl.trans(spread_tile), deviation$precision)
    score = tl.dot(query_tile, tl.trans(mean_tile), score$precision)
score = (tl.sqrt(deviation) + score) * scale
score += own[None, :]
$add_bias
"""

ADD_BIAS = """
score += tl.cast($bias, tl.float32)  #? bias and not together
score += tl.cast($bias, tl.float32) * $log2e  #? bias and together
"""

OF_A_HEAD = """
$expected
score = tl.where(score != score, float("inf"), score)
eligible = (own > float("-inf")) | (own != own)
score = tl.where(eligible[None, :], score, float("-inf"))
score = tl.where($allowed, score, float("-inf"))  #? allowed
"""

# In powers of 2. What cannot be chosen adds nothing; NaN adds the most.
OF_HEADS = """
gain = tl.zeros([ROWS, COLUMNS], tl.float32)
for one in range(HEADS):
    of_one = kv_head * HEADS + one
    h = of_one  #? lifted
    $read_queries  #? not in_parts
    near = tl.load(mass + row + one * q_len, mask=live, other=float("inf"))
    $expected
    score = tl.where($allowed, score, float("-inf"))  #? allowed
    score -= tl.where(near == float("-inf"), 0.0, near * $log2e)[:, None]
    grown = tl.exp2(score)
    grown = tl.where(grown < $most, grown, $most)
    gain += tl.where((near < float("inf"))[:, None], grown, 0.0)
score = gain  #? sorts
score = tl.where(gain > 0.0, gain, float("-inf"))  #? not sorts
"""

START_OF_A_HEAD = """
# The exponentials of the scores, and of what the query attends anyway: their sum, over that of the largest.
most = near
total = tl.where(near > float("-inf"), 1.0, 0.0)
"""

SUM_OF_A_HEAD = """
larger = tl.maximum(most, tl.max(score, 1))
level = tl.where(larger == float("-inf"), 0.0, larger)
total = total * tl.exp(most - level) + tl.sum(tl.exp(score - level[:, None]), 1)
most = larger
"""

BAR_OF_A_HEAD = """
# The least score of a cluster that is expected to have $share of the softmax; NaN hides nothing.
none = (near != near) | (total == 0.0)
bar = tl.where(most == float("inf"), most, most + tl.log(tl.where(none, 1.0, total)) + $log_share)
bar = tl.where(none, float("-inf"), bar)
"""

START_OF_HEADS = """
# The sum of the scores, and of what the queries attend anyway, which is 1 in each head.
total = tl.zeros([ROWS], tl.float32)
for one in range(HEADS):
    near = tl.load(mass + row + one * q_len, mask=live, other=float("inf"))
    total += tl.where(tl.abs(near) < float("inf"), 1.0, 0.0)
"""

SUM_OF_HEADS = """
total += tl.sum(score, 1)  #? plain
total += tl.sum(tl.maximum(score, 0.0), 1)  #? not plain
"""

BAR_OF_HEADS = """
# The least score of a cluster that is expected to have $share of the heads' softmaxes, in the mean.
bar = total * $share
"""


def in_parts(spec: Spec) -> bool:
    """Whether a score is a sum over parts of the features."""
    return spec.dtype == "float32" and spec.dim > FEATURES


def blocks(spec: Spec, parts: dict[str, Any]) -> dict[str, str]:
    """Blocks ``read_queries``, ``read_representatives``, ``score_of``, and with a share ``start``, ``sum`` and ``bar``.

    ``parts``: the names of the template.
    """
    share = spec.settings.share
    heads = bool(spec.together)
    parts = parts | dict(
        most=math.exp(MOST_GAIN), log2e=LOG2E, log_share=math.log(share) if share else 0.0, features=FEATURES,
        # Nothing is -inf that the sum must leave out.
        plain=parts["sorts"] and not parts["listed"] and not parts["sides"],
    )  # fmt: skip
    parts["add_bias"] = fill(ADD_BIAS, parts)
    queries, representatives = fill(READ_QUERIES, parts), fill(READ_REPRESENTATIVES, parts)
    parts |= dict(read_queries=queries, read_representatives=representatives)
    parts |= dict(expected=fill(EXPECTED_IN_PARTS if in_parts(spec) else EXPECTED, parts))
    start, total, bar = (
        (START_OF_HEADS, SUM_OF_HEADS, BAR_OF_HEADS) if heads else (START_OF_A_HEAD, SUM_OF_A_HEAD, BAR_OF_A_HEAD)
    )
    return dict(
        read_queries="" if heads or in_parts(spec) else queries,
        read_representatives="" if in_parts(spec) else representatives,
        score_of=fill(OF_HEADS if heads else OF_A_HEAD, parts),
        start=start if share else "",
        sum=fill(total, parts) if share else "",
        bar=fill(bar, parts) if share else "",
    )
