"""Bands in the generated kernels: attended exactly, and nothing outside of them is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sympy
import torch
from conftest import check_budget, in_double, operands, summary_of

from prescore_compile.kernels import reference
from prescore_compile.kernels.band import B, K, Q
from prescore_compile.kernels.logits import Logits
from prescore_compile.kernels.plan import WHOLE
from prescore_compile.kernels.triton import attend_backward as backward
from prescore_compile.kernels.triton.attend import attend

N = 150
DOCUMENT = torch.arange(N).div(40, rounding_mode="floor").expand(2, N)
T0 = sympy.Function("t0")
BANDS = {
    "sliding window": Logits(K >= Q - 20),
    "both sides": Logits(sympy.Abs(Q - K) <= 9),
    "chunks": Logits(sympy.Eq(sympy.floor(K / 24), sympy.floor(Q / 24))),
    "behind": Logits(sympy.And(K >= Q - 40, K <= Q - 30)),  # the first queries have no key
    "ahead": Logits(K >= Q + 3),
    "in documents": Logits(sympy.And(K >= Q - 20, sympy.Eq(T0(B, Q), T0(B, K))), softcap=2.0),
    "sloped": Logits(K > Q - 33, bias=-sympy.Rational(1, 16) * (Q - K)),
}

pytestmark = pytest.mark.usefixtures("poisoned")


def run(site: Any, logits: Logits, grad: torch.Tensor) -> list[torch.Tensor]:
    """The result, and the gradients of query, key and value."""
    summary, routes = summary_of(site, WHOLE), torch.empty(*site.query.shape[:3], 0, dtype=torch.int32)
    more = dict.fromkeys(logits.tensors, DOCUMENT) | dict(softcap=logits.softcap)
    out, sums = attend(site, summary, routes, WHOLE, logits.lifted, **more)
    return [
        out,
        *backward.attend_backward(grad, out, sums, site, summary, routes, WHOLE, logits.lifted, **more)[:3],
    ]


def by_reference(site: Any, logits: Logits, grad: torch.Tensor) -> list[torch.Tensor]:
    summary, routes = summary_of(site, WHOLE), torch.empty(*site.query.shape[:3], 0, dtype=torch.int32)
    given = (site, summary, routes, WHOLE, logits, dict.fromkeys(logits.tensors, DOCUMENT))
    return [reference.attend(*given), *reference.attend_backward(grad, *given)[:3]]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", BANDS)
def test_forward_and_backward(name: str, causal: bool) -> None:
    site = operands(N, causal=causal, padded=True, heads=3, kv_heads=1, dim=20, value_dim=24)
    grad = torch.randn(*site.query.shape[:3], 24)
    got = run(site, BANDS[name], grad)
    low, true = by_reference(site, BANDS[name], grad), by_reference(in_double(site), BANDS[name], grad.double())
    for g, lo, t in zip(got, low, true, strict=True):
        check_budget(g, lo, t, times=4)  # gradients: what is multiplied was rounded before


@pytest.mark.parametrize("queries", [1, 70])
def test_fewer_queries_than_keys(queries: int) -> None:
    """Queries are counted from the first one there is: a band's ends lie where its expression says."""
    site = operands(N, batch=1, heads=2, kv_heads=1, dim=16)
    site = site._replace(query=site.query[:, :, -queries:])
    logits = Logits(Q + (N - queries) - 20 <= K)
    grad = torch.randn_like(site.query)
    for g, w in zip(run(site, logits, grad), by_reference(site, logits, grad), strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the products of tiles."""
    from triton.runtime import interpreter

    counted = [0]
    create = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, *given: Any) -> Any:
        counted[0] += 1
        return create(self, *given)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    yield counted


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["sliding window", "both sides", "chunks"])
def test_work_grows_with_the_length_and_not_with_its_square(name: str, causal: bool, products: list[int]) -> None:
    if name == "sliding window" and not causal:
        pytest.skip("it ends on one side alone")
    counts = []
    for length in (512, 1024):
        site = operands(length, batch=1, heads=1, kv_heads=1, dim=16, causal=causal)
        products[0] = 0
        run(site, BANDS[name], torch.ones_like(site.query))
        counts.append(products[0])
    assert counts[1] <= 2.2 * counts[0], counts
