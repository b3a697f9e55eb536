from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prescore_compile import Config, attention, explain
from prescore_compile.kernels.plan import OptionError, Plan
from prescore_compile.passes import defaults

BAD = {
    "method": ("kmean", "kmeans, kmeans_relative, kernel_kmeans, kmedian, leverage, peak"),
    "chunk": (100, "cluster"),
    "cluster": (128, "16, 32 or 64"),
    "window": (2**31 - 1, "from 0 to 1073741824"),
    "sinks": (1.5, "from 0 to 65536"),
    "keep": (True, "from 0 to"),
    "centroids": (8, "routes"),
    "routes": ("27", ">= 0"),
    "coarse": (3, "0, or at least 4: 27 routes need as many clusters"),
    "residual": (1, "a bool"),
    "seed": (-3, "from 0 to"),
    "min_seq_len": (None, ">= 0"),
    "inner": ("inductr", "inductor, aot_eager, eager"),
    "include": ("*attn*", "list or tuple"),
    "exclude": ([1], "list or tuple"),
    "only_if_faster": (1, "a bool"),
    "dump": (3, "a folder's path"),
}


@pytest.mark.parametrize("key", BAD)
def test_an_error_names_the_key_the_value_and_what_is_allowed(key: str) -> None:
    value, allowed = BAD[key]
    with pytest.raises(OptionError) as caught:
        Config.from_options({key: value})
    text = str(caught.value)
    assert repr(key) in text and repr(value) in text and allowed in text


def test_unknown_options_are_errors() -> None:
    with pytest.raises(OptionError, match=r"'chunks'.*no such option.*chunk, window"):
        Config.from_options({"chunks": 128})


def test_every_field_can_be_set_and_is_frozen() -> None:
    options = dict(
        method="kmeans", chunk=64, window=32, sinks=4, keep=8, centroids=0, cluster=32, routes=9, coarse=6,
        min_seq_len=1, seed=3, inner="eager", include=["a.*"], exclude=["a.b"], only_if_faster=False, dump="stages",
    )  # fmt: skip
    config = Config.from_options(options)
    assert {key: getattr(config, key) for key in options} == options | {"include": ("a.*",), "exclude": ("a.b",)}
    assert type(config.plan_for(True, "cpu", 8192)) is Plan and config.plan_for(False, "cuda", 8192).chunk == 64
    with pytest.raises(AttributeError):
        config.chunk = 3  # type: ignore[misc]
    assert hash(config.plan_for(True, "cpu", 8192)) == hash(Config.from_options(options).plan_for(True, "cpu", 8192))


def test_a_site_without_settings_gets_the_default_of_its_kind() -> None:
    config = Config(min_seq_len=5)
    assert (
        config.plan_for(True, "cpu", 8192) == defaults.CAUSAL
        and config.plan_for(False, "cpu", 8192) == defaults.TWO_SIDED
    )
    assert config.plan_for(True, "cpu", 10**6) == defaults.CAUSAL
    assert config.plan_for(True, "cuda", 8192) == defaults.CAUSAL_ON_A_GPU
    assert config.plan_for(True, "cuda", defaults.TWO_LEVELS_FROM) == defaults.LONG_ON_A_GPU
    assert config.plan_for(False, "cuda", 8192) == defaults.TWO_SIDED_ON_A_GPU
    pairs = config.plan_for(False, "cuda", 8192, pairs=True)
    assert pairs == defaults.CAUSAL_ON_A_GPU, "a centroid stands for several keys"


def test_what_is_given_replaces_that_setting_of_each_default() -> None:
    config = Config(routes=40, window=128)
    assert config.plan_for(True, "cpu", 8192) == replace(defaults.CAUSAL, routes=40, window=128)
    assert config.plan_for(False, "cpu", 8192) == replace(defaults.TWO_SIDED, routes=40, window=128)
    assert Config(routes=27).plan_for(True, "cpu", 8192).routes == 27, "also where Plan() has the same value"
    keep = Config(keep=8)
    assert keep.plan_for(True, "cpu", 8192) == replace(defaults.CAUSAL, keep=8)
    assert keep.plan_for(False, "cpu", 8192) == Plan(keep=8), "not beside a residual"
    later = config.changed(routes=7, inner="eager")
    assert later.own_settings() == {"window": 128, "routes": 7} and later.inner == "eager" and config.routes == 40
    assert config != Config(routes=40) and copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_globs() -> None:
    config = Config(include=("model.layers.*",), exclude=("*.0.self_attn",))
    assert config.covers("model.layers.1.self_attn") and not config.covers("model.layers.0.self_attn")
    assert not config.covers("encoder.layers.1.self_attn")


def test_exact_takes_options() -> None:
    with pytest.raises(OptionError, match="'method': got 'nosuch'"):
        Config.exact(method="nosuch")
    config = Config.exact(inner="eager")
    assert config.window is None and config.routes == 0 and config.min_seq_len == 0 and config.inner == "eager"


def test_what_was_given_is_not_lost() -> None:
    with pytest.raises(TypeError, match=r"config\.changed.*or only the options that are meant"):
        replace(Config(), min_seq_len=0)
    assert Config().changed(min_seq_len=0).plan_for(True, "cpu", 8192) == Config().plan_for(True, "cpu", 8192)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": 0.1}, "did you mean 'share'"),
        ({"spread": 10**400}, "a number from 0 to below 1e"),
        ({"threshold": 1e308}, "a number from 0 to below 1e"),
        ({"clustering": ["kmeans", "pca_tree"]}, "one of pca_tree"),
        (["share"], "a dict of options"),
        ({"cluster": 24}, "16, 32 or 64"),
        ({"cluster": 16.0}, "16, 32 or 64"),
        ({"coarse": 8, "routes": 0}, "'coarse': got 8.*0 where routes is 0"),
        ({"spread": 1.4, "routes": 0}, "'spread': got 1.4.*beside routes of 1 or more"),
        ({"plan": {}}, "'plan': got {}.*it has no 'format'"),
        ({"plan": {"format": 1}}, "'plan': got {'format': 1}.*'torch' is missing"),
    ],
)
def test_odd_values_are_told_as_others_are(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Config.from_options(options)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"version": 1, "density": ' + "9" * 400 + "}"])
def test_odd_files_are_told_as_others_are(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(OptionError, match="plan"):
        Config(plan=str(tmp_path / "plan.json"))


READS_NOTHING: list[dict[str, Any]] = [{}, {"keep": 8, "threshold": 2.0}]


@pytest.mark.parametrize("more", READS_NOTHING)
def test_a_bidirectional_plan_that_reads_nothing_is_an_error(more: dict[str, Any]) -> None:
    config = Config(window=0, sinks=0, routes=0, min_seq_len=0, only_if_faster=False, **more)
    assert config.plan_for(True, "cpu", 8192).window == 0, "a causal query has its own chunk"
    x = torch.randn(1, 2, 64, 8)
    message = "'window': got 0.*1 or more, or None, at a bidirectional site with sinks=0, routes=0"
    with pytest.raises(OptionError, match=message):
        attention(x, x, x, config=config)
    with pytest.raises(OptionError, match=message):
        explain(lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x), x, config=config)
    for something in ({"sinks": 1}, {"routes": 1}, {"centroids": 1}, {"window": 1}, {"window": None}):
        config.changed(**something).plan_for(False, "cpu", 8192)
    config.changed(keep=1, threshold=0.0).plan_for(False, "cpu", 8192)


def test_without_routes_what_is_of_routes_goes() -> None:
    config = Config(share=0.1, spread=1.4, coarse=8, sinks=3).changed(routes=0)
    assert config.own_settings() == {"routes": 0, "sinks": 3}


def test_a_config_prints_as_what_was_given() -> None:
    assert repr(Config()) == "Config()" and repr(Config(share=0.01)) == "Config(share=0.01)"
    given = Config(routes=27, include=["a.*"], only_if_faster=False, dump="stages")
    assert repr(given) == "Config(routes=27, include=('a.*',), only_if_faster=False, dump='stages')"
    for config in (given, Config.exact(), Config(inner="eager")):
        assert eval(repr(config)) == config


def test_a_config_is_no_dict() -> None:
    x: Any = torch.ones(1, 1, 1, 1)
    with pytest.raises(OptionError, match="of a dict of options, Config"):
        explain(lambda x: x, x, config={})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="of a dict of options, Config"):
        attention(x, x, x, config={})  # type: ignore[arg-type]
