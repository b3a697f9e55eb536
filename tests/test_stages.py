"""What is recorded while passes run: stages, their rules and reasons, graph breaks and recompiles."""

from __future__ import annotations

import ast
import operator
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from prescore_compile import Config, graph_diff, observe
from prescore_compile.passes import rewrite
from prescore_compile.passes.dump import dump
from prescore_compile.passes.printing import in_short, printed
from prescore_compile.passes.stages import GraphLog, Log, listening

STAGES = ["captured", "sites found", "masks lifted", "decided", "inserted", "lowered"]
OPTIONS: dict[str, Any] = dict(min_seq_len=0, only_if_faster=False, inner="eager")


class Block(torch.nn.Module):
    def __init__(self, prefix: int = 0) -> None:
        super().__init__()
        self.prefix, self.out = prefix, torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[2])
        mask = at[None, :] <= at[:, None]
        if self.prefix:
            mask = mask | (at[None, :] < self.prefix)  # the line of a near miss
        return self.out(F.scaled_dot_product_attention(x, x, x, mask))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(Block(), Block(prefix=7), Block())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def broken(x: torch.Tensor) -> torch.Tensor:
    x = F.scaled_dot_product_attention(x, x, x)
    torch._dynamo.graph_break()
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def line_of(text: str) -> int:
    return next(at for at, line in enumerate(Path(__file__).read_text().splitlines(), 1) if text in line)


@pytest.fixture(scope="module")
def log() -> Log:
    return graph_diff(Model(), torch.randn(1, 2, 40, 8), config=Config(**OPTIONS)).log


def test_the_stages_in_order_as_python_with_the_users_lines(log: Log) -> None:
    (graph,) = log.graphs
    assert [stage.name for stage in graph.stages] == STAGES
    texts = {stage.name: printed(graph, stage) for stage in graph.stages}
    for text in texts.values():
        ast.parse(text)
        assert f"# {__file__}:{line_of('the line of a near miss')} in layers.1\n" in text
    assert "# >>> site: sdpa, by fused_call: batch 1, heads 2" in texts["sites found"]
    assert "# >>> mask: k <= q" in texts["masks lifted"] and "decision" not in texts["masks lifted"]
    assert "# >>> decision: rewrite with {'method': 'peak'" in texts["decided"]
    assert "# >>> first condition that failed, at" in texts["decided"]
    assert texts["inserted"].count("scaled_dot_product_attention(") > texts["lowered"].count("d_product_attention(")


def test_rules_and_near_misses_name_the_users_line(log: Log) -> None:
    rewritten, kept, _ = log.report.sites
    assert rewritten.rule == kept.rule == "fused_call" and not rewritten.failed
    assert kept.reason == "unsupported_mask: k <= 6 or k <= q"
    assert kept.failed.startswith(f"{__file__}:{line_of('the line of a near miss')}: mask = mask |")
    (difference,) = [graph.diff for graph in log.graphs]
    made = [region for region in difference.regions if region.added]
    assert [(region.rule, region.module) for region in made] == [("fused_call", "layers.0"), ("fused_call", "layers.2")]
    assert all(region.source == rewritten.source and region.removed for region in made)


def test_a_near_miss_of_hand_written_attention_names_the_operators_line() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        logits = x @ x.mT * 0.3
        logits = torch.sin(logits)  # what is not understood
        return logits.softmax(-1) @ x

    (site,) = graph_diff(model, torch.randn(1, 2, 40, 8), config=Config(**OPTIONS)).report.sites
    assert site.reason == "unsupported_logits: sin" and site.rule == "softmax_between_products"
    assert site.failed.startswith(f"{__file__}:{line_of('# what is not understood')}: logits = torch.sin(logits)")


def test_a_near_miss_names_a_line_where_its_reason_names_no_operator() -> None:
    def axis(x: torch.Tensor) -> torch.Tensor:
        weights = (x @ x.mT).softmax(-2)
        return weights @ x  # the sum over another axis

    def drops(x: torch.Tensor) -> torch.Tensor:
        logits = x @ x.mT
        logits = torch.dropout(logits, 0.5, True)  # the dropout of logits
        return logits.softmax(-1) @ x

    def reads(x: torch.Tensor) -> torch.Tensor:
        weights = (x @ x.mT).softmax(-1)
        seen = weights.amax()  # a second reader
        return weights @ x + seen

    marks = {axis: "# the sum over another axis", drops: "# the dropout of logits", reads: "# a second reader"}
    for model, mark in marks.items():
        (site,) = graph_diff(model, torch.randn(1, 2, 40, 8), config=Config(**OPTIONS)).report.sites
        assert site.reason and site.failed.startswith(f"{__file__}:{line_of(mark)}: "), (site.reason, site.failed)


def test_inserted_nodes_say_what_they_compute() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    x = torch.randn(1, 2, 256, 8)
    for dynamic in (False, True):
        (found,) = graph_diff(model, x, config=Config(**OPTIONS), dynamic=dynamic).diffs
        added = [found.after.nodes[at] for at in found.added]
        assert added and all(node.value for node in added), [node.name for node in added if not node.value]
        assert any(node.name == "prescore_route_attend" and node.value.startswith("float32[") for node in added)


def test_the_dump_tells_graphs_apart_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRESCORE_DUMP", str(tmp_path / "all"))
    compiled = torch.compile(broken, backend="prescore", options=OPTIONS)
    for length in (64, 96):
        compiled(torch.randn(1, 2, length, 8))
    folders = sorted(path.name for path in (tmp_path / "all").iterdir() if path.is_dir())
    assert folders == ["graph_0_0", "graph_0_1", "graph_1_0", "graph_1_1"]
    index = (tmp_path / "all" / "index.txt").read_text().splitlines()
    assert "ends with a graph break: Call to `torch._dynamo.graph_break()`" in index[0]
    assert f"broken ({__file__}:" in index[0] and "recompiled" not in index[0] and "recompiled" not in index[1]
    assert "recompiled: 0/0: tensor 'x' size mismatch at index 2. expected 64, actual 96" in index[2]
    files = sorted(path.name for path in (tmp_path / "all" / "graph_0_0").iterdir())
    assert [name.partition("_")[2] for name in files] == [f"{s.replace(' ', '_')}.py" for s in STAGES] + [
        "generated_source"
    ]
    kernel = (tmp_path / "all" / "graph_0_0" / "6_generated_source" / "attend.cpp").read_text()
    assert "q_len=64" in kernel.splitlines()[1] and "prescore_attend" in kernel


def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(Exception, match=r"option 'dump': got '/proc/none'.*allowed: a folder that can be written"):
        torch.compile(torch.sin, backend="prescore", options={"inner": "eager", "dump": "/proc/none"})(torch.ones(2))


def test_an_option_dumps_too_and_nothing_is_overwritten(tmp_path: Path) -> None:
    for _ in range(2):
        torch._dynamo.reset()
        x = torch.randn(1, 2, 64, 8)
        torch.compile(broken, backend="prescore", options=OPTIONS | {"dump": tmp_path})(x)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 4


def test_names_cannot_leave_the_folder(tmp_path: Path, log: Log) -> None:
    graph = log.graphs[0]
    evil = Log([GraphLog("../../<b>\n" + "x" * 500, stages=graph.stages[:1])])
    written = dump(evil, tmp_path)
    assert all(path.is_relative_to(tmp_path) and path.exists() and "<" not in path.name for path in written)
    ast.parse(written[0].read_text())


def doubled_to_added(gm: fx.GraphModule) -> None:
    for node in gm.graph.find_nodes(op="call_function", target=operator.mul):
        node.target, node.args = operator.add, (node.args[0], node.args[0])
    gm.recompile()


def test_any_fx_pass_is_observed() -> None:
    with observe() as log:
        gm = fx.symbolic_trace(lambda x: torch.relu(x * 2) + 1)
        doubled_to_added(gm)
        rewrite(gm, None, torch.zeros(3))
    (graph,) = log.graphs
    assert [stage.name for stage in graph.stages[:2]] == [
        "test_any_fx_pass_is_observed",
        "doubled_to_added",
    ] and graph.stages[1].made_by.startswith(f"doubled_to_added ({__file__}:")
    assert [stage.name for stage in graph.stages[2:]] == STAGES
    assert next(d.summary() for d in graph.diffs).startswith("1 removed, 1 added")
    assert len(graph.stages) == 8 and "doubled_to_added: 1 removed, 1 added" in str(log)


def test_a_pass_on_a_graph_that_was_there_before() -> None:
    gm = fx.symbolic_trace(lambda x: x * 2)
    with observe() as log:
        assert log.run(doubled_to_added, gm) is None
        new = log.run(lambda gm: fx.Transformer(gm).transform(), gm)
        new.graph.find_nodes(op="call_function", target=operator.add)[0].target = operator.sub
        new.recompile()
    (graph,) = log.graphs
    names = [stage.name for stage in graph.stages]
    assert names == ["before", "doubled_to_added", "test_a_pass_on_a_graph_that_was_there_before"] and graph.diff


def test_any_backend_is_observed_and_everything_is_put_back() -> None:
    before = fx.GraphModule.recompile
    with observe() as outer:
        with pytest.raises(ZeroDivisionError), observe() as inner:
            compiled = torch.compile(broken, backend="aot_eager")
            for length in (64, 96):
                compiled(torch.randn(1, 2, length, 8, requires_grad=True))
            raise ZeroDivisionError
        assert fx.GraphModule.recompile is not before
    assert fx.GraphModule.recompile is before
    assert [graph.name for graph in inner.graphs] == ["graph 0/0", "graph 1/0", "graph 0/1", "graph 1/1"]
    assert str(inner) == str(outer)
    assert [bool(graph.why) for graph in inner.graphs] == [False, False, True, True]
    assert [bool(graph.ends) for graph in inner.graphs] == [True, False, True, False]
    for graph in inner.graphs:
        assert graph.stages[0].name == "captured" and len(graph.stages) > 1
        assert any("aten." in node.target for node in graph.stages[-1].graph.nodes)


def test_nothing_is_recorded_unless_somebody_listens() -> None:
    log = Log()
    gm = fx.symbolic_trace(lambda x: x * 2)
    rewrite(gm, None, torch.zeros(3))
    with listening(log):
        pass
    assert not log.graphs
    with listening(log):
        doubled_to_added(gm)  # not a stage of ours
        rewrite(gm, None, torch.zeros(3))
    assert [stage.name for stage in log.graphs[0].stages] == STAGES


def test_bodies_of_higher_order_operators_are_graphs_of_their_own() -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(body, x, use_reentrant=False) + 1

    x = torch.randn(1, 2, 64, 8, requires_grad=True)
    found = graph_diff(model, x, config=Config(**OPTIONS))
    assert [graph.name for graph in found.log.graphs] == ["graph 0/0", "graph 0/0: wrap_body_0"]
    assert [len(graph.sites) for graph in found.log.graphs] == [0, 1] and found.diffs[1]


def test_runs_of_modules_are_drawn_together() -> None:
    names = [f"h.{i}.attn" for i in (0, 1, 2, 5)] + ["h.attn", "encoder"]
    assert in_short(names) == "h.{0-2,5}.attn, h.attn, encoder"


def test_one_thread_observes_at_a_time() -> None:
    """Two would put back each other's hooks."""
    before = fx.GraphModule.recompile
    told: list[str] = []

    def other() -> None:
        try:
            with observe():
                pass
        except RuntimeError as error:
            told.append(str(error))

    with observe():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert told == ["graphs are observed by another thread; one can at a time"]
    assert fx.GraphModule.recompile is before
