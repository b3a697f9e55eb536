"""A scorer that the user brings: by function or by name."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import scorer_of_a_user as user
import torch
from conftest import operands

from prescore_compile import Config, attention
from prescore_compile.kernels import ops
from prescore_compile.kernels.plan import OptionError, Plan

SMALL: dict[str, Any] = dict(chunk=32, window=8, sinks=2, keep=4, routes=0, min_seq_len=0, only_if_faster=False)


def test_a_function_is_kept_by_its_name() -> None:
    plan = Plan(method=user.widest, keep=4)  # type: ignore[arg-type]
    assert plan.method == "scorer_of_a_user:widest" and not plan.reads_queries
    assert Plan.parse(plan.text) == plan == pickle.loads(pickle.dumps(plan))
    assert Plan(method="scorer_of_a_user:asked").reads_queries


@pytest.mark.parametrize(
    "method",
    [lambda keys, mask: keys, user.of_three, "no_such_module:f", "scorer_of_a_user:nothing", "a b:c", ":", 3],
    ids=["lambda", "arguments", "module", "name", "spaces", "empty", "number"],
)
def test_what_cannot_be_found_again_is_refused(method: Any) -> None:
    with pytest.raises(OptionError, match=r"'method'.*allowed:.*function"):
        Config.from_options({"method": method})


@pytest.mark.parametrize("method", [user.of_one_chunk, user.of_integers])
def test_a_wrong_result_is_an_error(method: Any) -> None:
    q, k, v, *_ = operands(100, kv_heads=4)
    with pytest.raises(ValueError, match=r"scorer_of_a_user:of_.*got torch\..*allowed:.*\(32, 32\)"):
        attention(q, k, v, is_causal=True, config=Config.from_options(SMALL | {"method": method}))


@pytest.mark.parametrize("method", [user.widest, user.asked])
def test_end_to_end(method: Any) -> None:
    q, k, v, *_ = operands(150, kv_heads=4)
    options = SMALL | {"method": method}
    want = attention(q, k, v, is_causal=True, config=Config.from_options(options))

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    got = torch.compile(model, backend="prescore", options=options | {"inner": "eager"})(q, k, v)
    torch.testing.assert_close(got, want)
    assert not torch.equal(want, attention(q, k, v, is_causal=True, config=Config.from_options(SMALL)))


def test_the_models_own_keys_are_safe() -> None:
    site = operands(128)
    key = site.key.clone()
    ops.prescored(site, Plan(chunk=32, window=8, sinks=0, keep=4, routes=0, method="scorer_of_a_user:scribbling"))
    assert torch.equal(site.key, key)
