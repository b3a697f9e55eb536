"""The plan: the settings one attention site runs with."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .scorers import READS_QUERIES, custom

METHODS = (
    "kmeans", "kmeans_relative", "kernel_kmeans", "kmedian", "leverage", "peak", "window_peak", "random", "norm",
    "inverse_norm", "query"
)  # fmt: skip
FLAGS = ("group_routes", "residual")
CLUSTERINGS = ("pca_tree", "kmeans", "kmedian", "leverage", "principal", "contiguous")


class OptionError(ValueError):
    """A setting that does not exist or has a wrong type or value.

    The message names the setting, what was got and what is allowed.
    """

    def __init__(self, key: str, got: object, allowed: str) -> None:
        shown = repr(got)
        shown = shown if len(shown) <= 300 else shown[:300] + "..."
        super().__init__(f"option {key!r}: got {shown} ({type(got).__name__}); allowed: {allowed}")
        self.key = key
        self.got = got
        self.allowed = allowed


def check_int(key: str, value: object, low: int, high: int | None = None) -> None:
    """Raise ``OptionError`` unless ``value`` is an int (not a bool) in ``[low, high]``."""
    allowed = f"an int >= {low}" if high is None else f"an int from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionError(key, value, allowed)
    if value < low or (high is not None and value > high):
        raise OptionError(key, value, allowed)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one site attends: ONE softmax over window, rows and routes.

    All counts are keys unless said otherwise; every setting is per query head (routes) or per
    KV head (everything else). ``window=None`` means no limit: the plan that keeps everything.

    Attributes:
        method: the scorer that ranks keys for ``keep``: one of ``METHODS``, or a user's own function
            (see ``kernels.scorers.custom``), which is kept as ``"module:function"``.
        chunk: consecutive keys that are scored and clustered together when they are finished.
        window: at least this many keys before a query are attended exactly (and, at a
            bidirectional site, after it); the window begins and ends at chunk borders.
            0 leaves a causal query its own chunk and a bidirectional one no window.
        sinks: the first valid keys of a sequence, always attended.
        keep: selected keys a segment, at most; 0 inserts no score.
        threshold: of the keys, only those are selected that score at least this; 0.0: any key.
        centroids: residual centroids a segment, standing in for keys that were not selected;
            needs ``routes=0`` (a routed key would be counted twice).
        cluster: keys a cluster; ``chunk / cluster`` is a power of two.
        clustering: what groups a chunk's keys into clusters: one of ``CLUSTERINGS``.
        routes: clusters that a query attends; 0 inserts no route.
        spread: by how much the deviations of a cluster's keys from their mean count when clusters are ranked: 1.0 as if
            keys were normal, more where single keys stand out; 0.0: the mean alone.
        share: least share of a query's softmax that a cluster must be expected to have, to be routed to; ``routes`` is
            then the most that a query attends. The budget goes where attention is spread. 0.0: the best ``routes``.
        group_routes: whether the query heads of a KV head route together, to the clusters that have most of their
            softmax in the mean: a tile of a GPU then reads fewer clusters. Without effect where each has its own.
        residual: whether the clusters that a query does not attend stand in as centroids: mean key, mean value,
            logit bias log(count). Needs ``routes`` and ``keep=0`` (a selected key would be counted twice).
        coarse: chunks that a query looks into for its routes, chosen by representatives of their own (two
            levels; see ``kernels.coarse``); 0: it looks at every cluster.
        seed: seeds the scorers that draw; no global generator is touched.
    """

    method: str = "peak"
    chunk: int = 128
    window: int | None = 128
    sinks: int = 16
    keep: int = 0
    threshold: float = 0.0
    centroids: int = 0
    cluster: int = 16
    clustering: str = "pca_tree"
    routes: int = 27
    spread: float = 1.0
    share: float = 0.0
    group_routes: bool = False
    residual: bool = False
    coarse: int = 0
    seed: int = 0
    text: str = field(init=False, repr=False, compare=False, default="")
    """The settings as ``"method=peak chunk=128 ..."``: how a plan travels through a graph."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", _method(self.method))
        self._check_each()
        self._check_together()
        object.__setattr__(self, "text", " ".join(f"{k}={v}" for k, v in self.settings().items()))

    def _check_each(self) -> None:
        if not isinstance(self.clustering, str) or self.clustering not in CLUSTERINGS:
            raise OptionError("clustering", self.clustering, "one of " + ", ".join(CLUSTERINGS))
        if not isinstance(self.cluster, int) or self.cluster not in (16, 32, 64):
            raise OptionError("cluster", self.cluster, "16, 32 or 64")
        check_int("chunk", self.chunk, self.cluster, 1024)
        if self.window is not None:
            check_int("window", self.window, 0, 2**30)  # positions and it add up in 32 bits
        check_int("sinks", self.sinks, 0, 65536)
        check_int("keep", self.keep, 0, self.chunk)
        number = "a number from 0 to below 1e+06"
        numbers = ("threshold", number, 1e6), ("spread", number, 1e6), ("share", "from 0 to below 1", 1)
        for name, allowed, most in numbers:
            given = getattr(self, name)
            if not isinstance(given, (int, float)) or isinstance(given, bool) or not 0 <= given < most:
                raise OptionError(name, given, allowed)
            object.__setattr__(self, name, float(given))
        check_int("centroids", self.centroids, 0, self.chunk)
        check_int("routes", self.routes, 0)
        check_int("coarse", self.coarse, 0)
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise OptionError(name, getattr(self, name), "a bool")
        check_int("seed", self.seed, 0, 2**31 - 1)

    def _check_together(self) -> None:
        parts, rest = divmod(self.chunk, self.cluster)
        if rest or parts & (parts - 1):
            raise OptionError("chunk", self.chunk, f"cluster ({self.cluster}) times a power of two")
        if self.share and not self.routes:
            raise OptionError("share", self.share, "0 where routes is 0: it is of the clusters that are routed to")
        if self.coarse and not self.routes:
            raise OptionError("coarse", self.coarse, "0 where routes is 0: it is of the chunks that hold routes")
        if 0 < self.coarse * parts < self.routes:
            least = -(-self.routes // parts)
            allowed = f"0, or at least {least}: {self.routes} routes need as many clusters"
            raise OptionError("coarse", self.coarse, allowed)
        if self.group_routes and not self.routes:
            raise OptionError("group_routes", True, "False where routes is 0: it is of the clusters that are routed to")
        if self.residual and (not self.routes or self.keep):
            raise OptionError(
                "residual",
                self.residual,
                f"False where routes is 0 or keep is not (routes={self.routes}, keep={self.keep}): it is of the "
                "clusters that are not routed to, and a selected key in one of them would be counted twice",
            )
        if self.centroids and self.routes:
            raise OptionError(
                "centroids",
                self.centroids,
                f"0 while routes is not 0 (routes={self.routes}): a routed key that also stands "
                "in a centroid would be counted twice",
            )

    def check_reads(self, causal: bool) -> None:
        """Raise ``OptionError`` where a query of such a site may be left without any key: its output would be zeros.

        A causal query always has its own chunk. Of routes, even with a share, it always has one; of keys that must
        score a threshold, perhaps none.
        """
        near = causal or self.window is None or self.window or self.sinks
        if not (near or self.routes or self.centroids or (self.keep and not self.threshold)):
            rest = f"sinks=0, routes=0, centroids=0, keep={self.keep} and threshold={self.threshold:g}"
            allowed = f"1 or more, or None, at a bidirectional site with {rest}: a query may attend nothing"
            raise OptionError("window", self.window, allowed)

    @property
    def rows_per_segment(self) -> int:
        """Rows that one segment contributes: selected keys, then centroids."""
        return self.keep + self.centroids

    @property
    def spread_factor(self) -> float:
        """What the variance of a cluster of n keys is multiplied by, for each unit of ln(n): ``2 * spread ** 2``.

        The largest of n normal numbers is expected about ``sqrt(2 ln(n))`` standard deviations above their mean.
        """
        return 2 * self.spread**2

    @property
    def without_routes(self) -> Plan:
        """Nothing but window, sinks and what is selected."""
        return replace(self, routes=0, share=0.0, group_routes=False, residual=False, coarse=0)

    @property
    def near(self) -> Plan:
        """Nothing but window and sinks."""
        return replace(self.without_routes, keep=0, centroids=0)

    @property
    def only_window(self) -> bool:
        """Nothing but the window is attended: there is nothing to summarize."""
        return not (self.routes or self.sinks or self.rows_per_segment)

    @property
    def first_level(self) -> Plan:
        """Of two levels: how chunks are chosen."""
        return replace(self, routes=self.coarse, share=0.0, residual=False, coarse=0)

    @property
    def needs_mass(self) -> bool:
        """Whether routing needs each query's sum over window and sinks, which shares of the softmax are of."""
        return bool(self.share) or self.group_routes

    def together(self, group: int) -> int:
        """Of the ``group`` query heads of a KV head, how many route together."""
        return group if self.group_routes else 1

    @property
    def reads_queries(self) -> bool:
        """Whether the method scores keys by the queries at their own positions."""
        return self.method in READS_QUERIES or (":" in self.method and custom.reads_queries(self.method))

    def settings(self) -> dict[str, Any]:
        """The plan as a plain dict, in field order."""
        return {name: getattr(self, name) for name in PLAN_FIELDS}

    @staticmethod
    def parse(text: str) -> Plan:
        """The plan whose ``text`` this is."""
        return _parse(text)


def _method(method: object) -> str:
    """The name of a method; ``OptionError`` unless it is one."""
    if isinstance(method, str) and method in METHODS:
        return method
    try:
        if callable(method):
            return custom.name_of(method)
        if isinstance(method, str) and ":" in method and not set(method) & set(" ="):
            custom.find(method)
            return method
    except ValueError as error:
        raise OptionError("method", method, str(error)) from error
    raise OptionError("method", method, f"one of {', '.join(METHODS)}; or {custom.ALLOWED}")


PLAN_FIELDS = tuple(f.name for f in fields(Plan) if f.init)

WHOLE = Plan(window=None, sinks=0, routes=0)
"""Every key that the mask allows: of a band, whatever plan others run with. It is exact."""


@functools.cache
def _parse(text: str) -> Plan:
    values: dict[str, Any] = dict(setting.split("=") for setting in text.split())
    for name, value in values.items():
        if name in ("threshold", "spread", "share"):
            values[name] = float(value)
        elif name in FLAGS:
            values[name] = value == "True"
        elif name not in ("method", "clustering"):
            values[name] = None if value == "None" else int(value)
    return Plan(**values)
