"""What each way of a case should give, by the reference in float32."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from prescore_compile.kernels import coarse, reference, routing
from prescore_compile.kernels import summary as summaries
from prescore_compile.kernels.band import K, Q
from prescore_compile.kernels.logits import Logits
from prescore_compile.kernels.plan import WHOLE as WHOLE_PLAN
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.summary import Summary

from .ways import BACKENDS, MASKED, SCORED, SCORES, Ways, scored, selected

WHOLE = 4096
"""Up to so many keys, every query is compared with the reference."""
CHECKED = 32
"""Beyond, so many: the last of a causal site, the first of any other."""
LIMIT = 3e-2
"""The largest error of an output of unit variance in bfloat16, as on a CPU."""
ROUTES_LIMIT = 1e-2
"""The most of their score that routes may lose against the best ones, on one level."""


class Checks:
    """Each check takes what a way gave, and gives its error; what it needs of the reference is made when asked for."""

    def __init__(self, ways: Ways) -> None:
        self.ways, self.site, self.plan = ways, ways.site, ways.plan

    @functools.cached_property
    def all(self) -> dict[str, Callable[[Any], float]]:
        """By the names of ``Ways.all``, and "flex"."""
        found: dict[str, Callable[[Any], float]] = {
            "summarize": self.means,
            "mass": lambda got: error(self.some(got), self.near),
            "route": self.routes,
            "attend": lambda got: error(self.some(got), self.attended),
            "total": lambda got: error(self.some(got), self.attended),
            "total, backward": lambda got: self.gradients(got, self.attended_gradients()),
            "centroids": self.centroids,
            "centroids, backward": self.centroids_backward,
            "flex": self.flex,
            "band": lambda got: error(self.some(got), self.wholly(True)),
            MASKED: lambda got: error(self.some(got), self.wholly(True)),
            "sink": lambda got: error(self.some(got), self.wholly(False)),
            "band, backward": lambda got: self.gradients(got, self.wholly_gradients(True)),
            "sink, backward": lambda got: self.gradients(got, self.wholly_gradients(False)),
        }
        for name in BACKENDS:
            found[f"sdpa {name}"] = lambda got: error(self.some(got), self.exact)
            found[f"sdpa {name}, backward"] = lambda got: self.gradients(got, self.exact_gradients())
        return found | {name: functools.partial(self.scores, of) for name, of in zip(SCORES, SCORED, strict=True)}

    def limit(self, name: str) -> float:
        return ROUTES_LIMIT if name == "route" and not self.plan.coarse else LIMIT

    @property
    def whole(self) -> bool:
        return self.site.query.shape[2] <= WHOLE

    def some(self, tensor: torch.Tensor) -> torch.Tensor:
        """The queries that are checked, of ``[B, H, Nq, ...]``."""
        if self.whole:
            return tensor
        return tensor[:, :, -CHECKED:] if self.site.causal else tensor[:, :, :CHECKED]

    @functools.cached_property
    def few(self) -> Operands:
        """The site with only the queries that are checked, in float32."""
        query, key, value = (t.float() for t in (self.some(self.site.query), *self.site[1:3]))
        return self.site._replace(query=query, key=key, value=value)

    @functools.cached_property
    def wide(self) -> Summary:
        """The summary that was found, with rows in float32."""
        found = self.ways.summary
        return found._replace(row_key=found.row_key.float(), row_value=found.row_value.float())

    @functools.cached_property
    def exact(self) -> torch.Tensor:
        return reference.exact(self.few)

    @functools.cached_property
    def attended(self) -> torch.Tensor:
        return reference.attend(self.few, self.wide, self.some(self.ways.routes), self.plan)

    @functools.cached_property
    def near(self) -> torch.Tensor:
        return reference.mass(self.few, self.wide, self.plan)

    def means(self, got: Summary) -> float:
        """Largest error of a mean of a cluster of the last chunks, against the keys that stand in it."""
        plan, site = self.plan, self.site
        if not plan.routes:
            return 0.0
        order = got.order.unflatten(2, (-1, plan.cluster))[:, :, -64:].long()
        held = (order >= 0).unsqueeze(4)
        index = order.clamp(min=0).flatten(2).unsqueeze(3).expand(-1, -1, -1, site.key.shape[3])
        keys = site.key.float().gather(2, index).unflatten(2, order.shape[2:]) * held
        return error(got.mean[:, :, -64:], keys.sum(3) / held.sum(3).clamp(min=1))

    def routes(self, got: torch.Tensor) -> float:
        """How much score the chosen clusters lose against the best ones, of the largest total.

        With a share, rounding may decide whether a cluster has it: a few routes may be more or less. On two levels, it
        may decide which chunk is looked into, too.
        """
        site, plan, summary = self.site, self.plan, self.ways.summary
        query = self.some(site.query)
        scores = routing.routing_scores(query.float(), summary, site.scale)
        group = query.shape[1] // site.key.shape[1]
        near = self.ways.near
        mass = None if near is None else self.some(near)
        best = coarse.route(query, summary, plan, site.causal, site.key.shape[2], site.scale, mass=mass)
        chosen = self.some(got)
        taken, wanted = ((routes >= 0).sum(3) for routes in (chosen, best))
        allowed = 0.0 if not plan.share else 0.03 if plan.coarse else 0.01
        if (taken - wanted).abs().sum() > allowed * wanted.sum():
            return math.inf
        same = taken == wanted
        if plan.together(group) > 1:  # all heads of a group have the same routes, chosen by what they gain together
            assert mass is not None
            scores = routing.together(scores, mass.float(), group)[0]
            chosen, best, same = chosen[:, ::group], best[:, ::group], same[:, ::group]
        gained, most = (scores.gather(3, r.long().clamp(min=0)).masked_fill(r < 0, 0).sum(3) for r in (chosen, best))
        return float(((most - gained).abs() / most.abs().clamp(min=1))[same].max())

    def exact_gradients(self) -> tuple[torch.Tensor, ...]:
        return self.gradients_of(self.few, Logits())

    def gradients_of(self, site: Operands, logits: Logits) -> tuple[torch.Tensor, ...]:
        """In query, key and value, where every key is attended."""
        grad = self.some(self.ways.grad).float()
        return reference.attend_backward(grad, site, *nothing(site), logits)[:3]

    def sunk(self, banded: bool) -> tuple[Operands, Logits]:
        """A site that is attended whole: with the window of ``Ways``, or with its learned sink."""
        first = self.few.key.shape[2] - self.few.query.shape[2] if self.site.causal else 0
        if banded:  # the queries that are checked are numbered anew
            return self.few, Logits(Q + first - self.ways.window < K)
        return self.few._replace(sink_logit=self.some(self.ways.sink_logit)), Logits()

    def wholly(self, banded: bool) -> torch.Tensor:
        site, logits = self.sunk(banded)
        return reference.attend(site, *nothing(site), logits)

    def wholly_gradients(self, banded: bool) -> tuple[torch.Tensor, ...]:
        return self.gradients_of(*self.sunk(banded))

    def attended_gradients(self) -> tuple[torch.Tensor, ...]:
        found, routes = self.wide, self.some(self.ways.routes)
        query, *of = reference.attend_backward(self.some(self.ways.grad).float(), self.few, found, routes, self.plan)
        index, owner, length = found.row_index, found.row_owner, self.few.key.shape[2]
        key, value = (of[i] + summaries.scatter_rows(of[i + 2], index, owner, length) for i in (0, 1))
        return query, key, value

    def gradients(self, got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> float:
        """Largest error of the gradients in the queries that are checked, and in the keys that no other query reaches.

        Those are all where all queries are checked; else the last of a causal site.
        """
        errors = [error(self.some(got[0]), want[0], least=0.1)]
        for g, w in zip(got[1:], want[1:], strict=True):
            if self.whole or self.site.causal:
                summed = g.float().unflatten(1, (w.shape[1], -1)).sum(2)  # of the heads that read a key
                errors.append(error(self.some(summed), self.some(w), least=0.1))
        return max(errors)

    def scores(self, method: str, got: torch.Tensor) -> float:
        """Largest error of the scores of the first chunk, which no other key takes part in."""
        plan = scored(self.plan, method)
        query, key = (tensor[:, :, : plan.chunk].float() for tensor in self.site[:2])
        want = summaries.score(query, key, None, plan, self.site.causal, self.site.scale)
        return error(got[:, :, : plan.chunk], want)

    def centroids(self, got: Summary) -> float:
        """Largest error of the rows of the first chunks, of which no other key is part; their owners too."""
        plan = selected(self.plan)
        length = min(4 * plan.chunk, self.site.key.shape[2])
        key, value = (tensor[:, :, :length] for tensor in self.site[1:3])
        want = summaries.summarize(key, value, None, self.ways.norms[:, :, :length], plan)
        rows = want.row_index.shape[2]
        if not torch.equal(got.row_index[:, :, :rows], want.row_index):
            return math.inf
        # Two keys may be as near to one centre as to another.
        if (got.row_owner[:3, ..., :length] != want.row_owner[:3]).float().mean() > 1e-3:
            return math.inf
        return max(error(g[:, :, :rows], w.float()) for g, w in zip(got[6:8], want[6:8], strict=True))

    def centroids_backward(self, got: tuple[Summary, tuple[torch.Tensor, ...]]) -> float:
        """Largest error of the gradients, for the rows that were found."""
        found, grads = got
        ones = torch.ones_like(found.row_key, dtype=torch.float32)
        want = summaries.scatter_rows(ones, found.row_index, found.row_owner, self.site.key.shape[2])
        return max(error(grad[..., : want.shape[3]], want) for grad in grads)

    def flex(self, got: torch.Tensor) -> float:
        """Largest error of FlexAttention, against dense attention with its mask."""
        few, n = self.few, self.site.key.shape[2]
        place = torch.arange(n, device=few.query.device)
        query = self.some(place.view(1, 1, n, 1))[0, 0]
        mask = self.ways.mask_mod(None, None, query, place)
        more = dict(scale=few.scale, enable_gqa=self.ways.case.group > 1)
        return error(self.some(got), F.scaled_dot_product_attention(*few[:3], attn_mask=mask, **more))


def nothing(site: Operands) -> tuple[Summary, torch.Tensor, Plan]:
    """Beside the keys: a summary of nothing, no routes, and the plan that attends every key."""
    none = site.query.new_empty(*site.key.shape[:2], 0)
    wide = none.unsqueeze(3).expand(-1, -1, -1, site.query.shape[3])
    empty = Summary(none.int(), wide, wide, none, none.int(), none.int(), wide, wide, none)
    return empty, site.query.new_empty(*site.query.shape[:3], 0, dtype=torch.int32), WHOLE_PLAN


def error(got: torch.Tensor, want: torch.Tensor, least: float = 1.0) -> float:
    """Largest difference, relative to ``least`` or to the largest expected number; NaN counts as infinite."""
    difference = (got.float() - want).abs().max() / want.abs().max().clamp(min=least)
    return float(difference.nan_to_num(nan=float("inf")))
