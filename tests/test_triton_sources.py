"""The sources that plans are written to: golden files, and that what a plan does not use is not there.

``python tests/test_triton_sources.py`` writes the golden files again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import sympy
from conftest import PLANS

from prescore_compile.kernels.plan import METHODS, WHOLE, Plan
from prescore_compile.kernels.triton import listing, sources
from prescore_compile.kernels.triton.attend_backward import backward_spec
from prescore_compile.kernels.triton.maths import lifted
from prescore_compile.kernels.triton.scores import kernel as scores
from prescore_compile.passes.defaults import CAUSAL, CAUSAL_ON_A_GPU

GOLDEN = Path(__file__).with_name("golden")
Q, K = sympy.symbols("q k", integer=True, nonnegative=True)
DOCUMENT = sympy.Function("document")


def golden() -> dict[str, str]:
    """A handful: the default plan, what it needs beside it, a mask, a backward, and scores."""
    default = listing.spec(CAUSAL, dim=64)
    together = listing.spec(CAUSAL_ON_A_GPU, dim=128, group=4)
    streaming = listing.spec(PLANS["streaming"], dim=80, value_dim=64, group=3, dtype="float32", causal=False)
    masked = listing.spec(
        Plan(window=None, sinks=0, routes=0),
        dim=128,
        dtype="float16",
        causal=False,
        valid=True,
        softcap=30.0,
        lifted=lifted(sympy.Eq(DOCUMENT(Q), DOCUMENT(K)), sympy.Rational(-1, 8) * sympy.Abs(Q - K)),
    )
    banded = listing.spec(WHOLE, dim=64, causal=False, lifted=lifted(sympy.Abs(Q - K) <= 64))
    sunk = listing.spec(WHOLE, dim=64, group=8, lifted=lifted(K > Q - 128), sink_logit=True)  # gpt-oss, a local layer
    selected = backward_spec(listing.spec(PLANS["centroids"], dim=64, target="hip"))
    residual = listing.spec(
        Plan(window=0, sinks=1, cluster=32, routes=12, residual=True), dim=64, group=2, causal=False
    )
    by_leverage = listing.spec(Plan(method="leverage", keep=16, routes=0), dim=128)
    by_median = listing.spec(Plan(method="kmedian", keep=16, routes=0), dim=64, valid=True)
    by_peak = listing.spec(Plan(method="peak", keep=16, threshold=0.1, routes=0), dim=80, group=3, dtype="float32")
    return {
        "leverage_score": listing.all_sources(by_leverage, "")["score"],
        "kmedian_score": listing.all_sources(by_median, "")["score"],
        "peak_score": listing.all_sources(by_peak, "")["score"],
        "peak_select": listing.all_sources(by_peak, "")["select"],
        "peak_select_segments": listing.all_sources(by_peak, "")["select_segments"],
        "default_route": listing.all_sources(default, "")["route"],
        "together_route": listing.all_sources(together, "")["route"],
        "default_union": listing.forward_sources(default)["union"],
        "default_arrange": listing.forward_sources(default)["arrange"],
        "default_attend": listing.forward_sources(default)["attend"],
        "streaming_attend": listing.forward_sources(streaming)["attend"],
        "masked_attend": listing.forward_sources(masked)["attend"],
        "banded_attend": listing.forward_sources(banded)["attend"],
        "sunk_attend": listing.forward_sources(sunk)["attend"],
        "banded_d_window": listing.backward_sources(backward_spec(banded))["d_window"],
        "default_d_routes": listing.backward_sources(backward_spec(default))["d_routes"],
        "residual_attend": listing.forward_sources(residual)["attend"],
        "residual_centroids": listing.forward_sources(residual)["centroids"],
        "residual_d_residual": listing.backward_sources(backward_spec(residual))["d_residual"],
        "centroids_d_segments": listing.backward_sources(selected)["d_segments"],
        "centroids_rows_backward": listing.backward_sources(selected)["rows_backward"],
        "centroids_segment_assign_1": listing.all_sources(selected, "")["segment_assign_1"],
    }


@pytest.mark.parametrize("name", golden())
def test_golden(name: str) -> None:
    want = (GOLDEN / f"{name}.py").read_text()
    assert golden()[name] == want, f"differs from tests/golden/{name}.py; if it should: python {Path(__file__).name}"


def test_what_a_plan_does_not_use_is_not_in_its_source() -> None:
    words = {
        "listed": lambda spec: spec.routes,
        "row_key": lambda spec: bool(spec.settings.sinks or spec.settings.rows_per_segment),
        "rest_key": lambda spec: spec.settings.residual,
        "row_bias": lambda spec: bool(spec.settings.centroids),
        "copies": lambda spec: bool(spec.settings.keep) and spec.routes,
        "valid": lambda spec: spec.valid and (spec.causal or spec.settings.window != 0),
        "position": lambda spec: spec.causal,
        "Window": lambda spec: spec.causal or spec.settings.window != 0,
        "capped": lambda spec: bool(spec.softcap),
        "mask_": lambda spec: bool(spec.lifted.loads),
        "sink_logit": lambda spec: spec.sink_logit,
        "split = ": lambda spec: spec.splits > 1,
    }
    specs = [
        listing.spec(plan, dim=64, causal=causal, valid=valid, softcap=softcap, sink_logit=valid, splits=splits)
        for plan in PLANS.values()
        for causal, valid, softcap, splits in ((True, False, 0.0, 1), (False, True, 0.0, 1), (True, True, 5.0, 8))
        if not (plan.residual and softcap)
    ]
    for spec in specs:
        text = listing.forward_sources(spec)["attend"].split("@triton.jit")[1]
        for word, used in words.items():
            assert (word in text) == used(spec), (word, spec)


def test_sources_say_where_they_come_from() -> None:
    plan = PLANS["keep and routes"]
    found = sources(plan, site="model.layers.3.self_attn", dim=64, group=2)
    of_attend = ["attend", "d_query", "d_window", "d_routes", "d_sinks", "d_segments"]
    assert list(found)[-7:] == [*of_attend, "rows_backward"]
    for name, text in found.items():
        head = text.split("import triton")[0]
        assert text.startswith(f"# {name}: written by prescore_compile")
        assert "# module: model.layers.3.self_attn" in head and "stage: " in head
        assert all(f"{k}={v}" in head for k, v in plan.settings().items())
        compile(text, name, "exec")


@pytest.mark.parametrize("method", METHODS)
def test_sites_that_select_keys_list_their_scores(method: str) -> None:
    found = sources(Plan(method=method, keep=8), dim=64, group=4, site="model.layers.0.self_attn")
    assert ("score" in found) == (method in scores.METHODS) and "select" in found
    assert not {"score", "select"} & sources(Plan(method=method), dim=64).keys()
    if "score" in found:
        head = found["score"].split("import triton")[0]
        assert f"# stage: score, {method} of a chunk's keys" in head and "# module: model.layers.0" in head
        assert ("query" in found["score"]) == (method in scores.READ_QUERIES)
        assert next(iter(found)) == "score"


def test_equal_specs_have_equal_sources() -> None:
    spec = listing.spec(Plan(), dim=64)
    assert listing.forward_sources(spec) == listing.forward_sources(dataclasses.replace(spec))
    other = listing.forward_sources(listing.spec(Plan(), dim=128))
    assert other["attend"] != listing.forward_sources(spec)["attend"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "dim: got 0; allowed: 1 to 256"),
        ({"dim": 64, "value_dim": 512}, "value_dim: got 512"),
        ({"dim": 64, "dtype": "float64"}, "dtype: got 'float64'; allowed: one of float16"),
        ({"dim": 64, "target": "xpu"}, "target: got 'xpu'; allowed: one of cuda, hip"),
    ],
)
def test_what_no_kernel_is_written_for_is_a_clear_error(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sources(Plan(), **change)


if __name__ == "__main__":
    for name, text in golden().items():
        (GOLDEN / f"{name}.py").write_text(text)
