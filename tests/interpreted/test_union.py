"""The lists of clusters that tiles attend, interpreted, against lists written down one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import operands

from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.triton import union as kernel
from prescore_compile.kernels.triton.attend import spec_of
from prescore_compile.kernels.triton.spec import Spec
from prescore_compile.kernels.triton.union import union

PLAN = Plan(chunk=64, window=0, sinks=0, routes=6)
CLUSTERS = 40

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def _fresh_sources() -> Iterator[None]:
    """Those of other sizes of blocks."""
    for source in (kernel.union_source, kernel.arrange_source):
        source.cache_clear()
    yield
    for source in (kernel.union_source, kernel.arrange_source):
        source.cache_clear()


def written(spec: Spec, routes: torch.Tensor, kv_head: int, tile: int) -> list[tuple[int, list[int]]]:
    """Clusters of a tile of the first sequence, by the first row that chose them, and all rows that did.

    As many queries as keys, no window.
    """
    of_queries, part = divmod(tile, spec.head_parts)
    block, inside = divmod(of_queries, spec.tiles_a_chunk) if spec.aligned else (0, of_queries)
    begin = block * spec.settings.chunk + inside * spec.queries
    end = min(begin + spec.queries, routes.shape[2])
    if spec.aligned:
        end = min(end, (block + 1) * spec.settings.chunk)
    heads = [part * spec.heads + head for head in range(spec.heads)]
    rows: dict[int, list[int]] = {}
    for query in range(begin, end):
        for head in heads[:1] if spec.together else [head for head in heads if head < spec.group]:
            row = query - begin if spec.together else (query - begin) * spec.heads + head - heads[0]
            for cluster in routes[0, kv_head * spec.group + head, query].tolist():
                if cluster >= 0:
                    rows.setdefault(cluster, []).append(row)
    return sorted(((c, sorted(of)) for c, of in rows.items()), key=lambda found: (found[1][0], found[0]))


@pytest.mark.parametrize("at_once", [4096, 128], ids=["one block", "many blocks"])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("group", "causal", "rows"), [(1, True, 64), (3, True, 64), (2, False, 32), (19, True, 16)])
def test_lists(
    group: int, causal: bool, rows: int, together: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "ARRANGED", at_once)
    monkeypatch.setattr(kernel, "BLOCK", at_once // 2)
    check(group, causal, rows, together)


@pytest.mark.parametrize(("group", "causal", "rows"), [(1, True, 64), (2, False, 32), (19, True, 16)])
def test_numbers_sorted_on_chip(group: int, causal: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "SORTED_ON_CHIP", 4096)
    check(group, causal, rows, together=True)


def check(group: int, causal: bool, rows: int, together: bool) -> None:
    plan = replace(PLAN, group_routes=together)
    length = 75 if group < 10 else 36
    site = operands(length, heads=2 * group, kv_heads=2, batch=1, causal=causal)
    routes = torch.rand(1, 2 * group, length, CLUSTERS).argsort(3)[..., : plan.routes].int()
    routes = routes.masked_fill(torch.rand(routes.shape) < 0.3, CLUSTERS).sort(3).values
    routes = routes.masked_fill(routes == CLUSTERS, -1)
    if together:
        routes = routes[:, ::group].repeat_interleave(group, 1)
    spec = spec_of(site, plan)
    spec = replace(spec, splits=1, tile=replace(spec.tile, rows=rows))
    lists = union(spec, routes, length, length, 2, CLUSTERS)
    tiles = spec.tiles(length, length)
    assert spec.words == (2 if rows == 64 and not spec.together else 1)
    for at in range(2 * tiles):
        listed, words = lists["listed"][at].tolist(), lists["listed_rows"][at].tolist()
        got = [
            (listed[slot], [row for row in range(32 * spec.words) if words[slot][row // 32] >> row % 32 & 1])
            for slot in range(int(lists["listed_count"][at]))
        ]
        assert got == written(spec, routes, at // tiles, at % tiles)
