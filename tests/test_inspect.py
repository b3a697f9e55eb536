"""``prescore explain``, ``diff`` and ``kernels``: formats, exit codes, bad input; the exports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint

import prescore_compile
from prescore_compile import Config, Inspection, OptionError, explain, graph_diff
from prescore_compile.cli import main
from prescore_compile.inspection import dot, explorer

REWRITE = ["--set", "min_seq_len=0", "--set", "only_if_faster=False"]
EVIL = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">'

MODEL = """
import torch
import torch.nn.functional as F

print("noise on standard output")


class Attention(torch.nn.Module):
    def forward(self, x):
        mask = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(x, x, x, mask)


class Dropped(torch.nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


def make():
    model = torch.nn.Sequential(Attention(), Dropped())
    model.add_module(EVIL, Attention())
    return model, torch.randn(1, 2, 64, 8)


def by_name():
    return (lambda x: F.scaled_dot_product_attention(x, x, x)), {"x": torch.randn(1, 2, 64, 8)}


def strided():
    def model(x):
        at = torch.arange(x.shape[2])
        mask = (at[None, :] <= at[:, None]) & ((at[:, None] - at[None, :]) % 4 < 2)
        return F.scaled_dot_product_attention(x, x, x, mask)
    return model, torch.randn(1, 2, 64, 8)


def needs(x):
    return x


def broken():
    raise KeyError("no weights")


def stops():
    raise SystemExit(7)


def wrong():
    return 3


def raises():
    def model(x):
        raise ValueError("only for squares")
    return model, torch.zeros(2)


def misfits():
    return torch.nn.Sequential(Attention(), torch.nn.Linear(9, 4)), torch.zeros(1, 2, 64, 8)


def misfits_a_line():
    def model(x):
        x = F.scaled_dot_product_attention(x, x, x)
        return F.linear(x, torch.zeros(4, 9))
    return model, torch.zeros(1, 2, 64, 8)


def breaks():
    def model(x):
        x = F.scaled_dot_product_attention(x, x, x)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(x, x, x)
    return model, torch.randn(1, 2, 64, 8)


def loops():
    def model(x):
        for _ in range(2):
            x = F.scaled_dot_product_attention(x, x, x)
            torch._dynamo.graph_break()
        return x
    return model, torch.randn(1, 2, 64, 8)


LIMIT = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("targets") / "modèle toy.py"
    path.write_text(MODEL.replace("EVIL", repr(EVIL.replace(".", "·"))), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).relu()

    return graph_diff(model, torch.randn(1, 2, 64, 8), config=Config(min_seq_len=0, only_if_faster=False))


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> str:
    """What a command prints; errors where it fails."""
    assert main([str(argument) for argument in arguments]) == code
    printed = capsys.readouterr()
    return printed.out if code == 0 else printed.err


def test_explain_names_rules_and_the_first_condition_that_failed(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, "explain", f"{file}:make", *REWRITE)
    assert "3 sites: 2 rewritten, 1 kept exact" in text and "noise" not in text and "\x1b" not in text
    assert "fused_call: a call of F.scaled_dot_product_attention" in text
    line = next(at for at, code in enumerate(MODEL.splitlines(), 1) if "dropout_p=0.5" in code)
    assert "dropout: 0.5\n    Attention dropout is on." in text
    assert f"at {file}:{line}: return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)\n    1" in text


def test_diff_as_text_json_and_dot(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "diff", f"{file}:by_name", *REWRITE, "--color", "always")
    assert "\x1b[32m+ prescore_route_attend = prescore.route_attend.default(" in text
    assert "\x1b[31m- scaled_dot_product_attention = torch.nn.functional.scaled_dot" in text
    (graph,) = json.loads(said(capsys, "diff", f"{file}:by_name", *REWRITE, "--format", "json"))["graphs"]
    assert next(stage["name"] for stage in graph["stages"]) == "captured" and graph["sites"][0]["rule"] == "fused_call"
    gone = [graph["before"][at]["target"] for at in graph["removed"]]
    assert gone == ["torch.nn.functional.scaled_dot_product_attention"]
    assert all(graph["after"][at]["source"].startswith(str(file)) for at in graph["added"])
    drawing = said(capsys, "diff", f"{file}:make", *REWRITE, "--format", "dot")
    assert drawing.startswith("digraph") and drawing.count("{") == drawing.count("}")


def test_kernels_print_once_what_runs(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "kernels", f"{file}:by_name", *REWRITE)
    assert text.startswith("@@ attend.cpp\n# 1 site: ") and "k_len=64 head_dim=8 method=peak" in text
    assert text.count('extern "C" {') == 3 and text.count("// native/softmax.h") == 1
    assert "no site is rewritten" in said(capsys, "kernels", f"{file}:by_name")


def test_kernels_for_a_gpu_need_none(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "kernels", f"{file}:by_name", *REWRITE, "--device", "cuda")
    assert text.startswith("@@ cluster.py\n# 1 site: ") and "causal=False valid=False" in text
    assert "@@ attend.py" in text and "@@ d_query.py" in text and "@triton.jit" in text and "attend.cpp" not in text
    (kernel, *_) = json.loads(said(capsys, "kernels", f"{file}:make", *REWRITE, "--device", "hip", "--format", "json"))[
        "kernels"
    ]
    assert kernel["language"] == "python" and len(kernel["sites"]) == 2
    compile(kernel["text"], kernel["name"], "exec")


def test_a_device_decides(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Decisions, graph and kernels are all of the device that is asked about; the report says which."""
    text = said(capsys, "explain", f"{file}:strided", *REWRITE)
    assert "by its mask, where that turns out to be causal: {" in text and "device: cpu" in text
    assert "by its mask, else: every key that the mask allows is attended: it is read as it comes" in text
    text = said(capsys, "explain", f"{file}:strided", *REWRITE, "--device", "cuda")
    assert "1 rewritten" in text and "device: cuda" in text and "'group_routes': True" in text
    assert "not_faster" in said(capsys, "explain", f"{file}:strided", *REWRITE[:2], "--device", "hip")
    text = said(capsys, "diff", f"{file}:by_name", *REWRITE, "--device", "cuda")
    assert "prescore.attend.default(" in text and "route_attend" not in text
    page = said(capsys, "explain", f"{file}:by_name", *REWRITE, "--device", "hip", "--format", "html")
    assert '"device":"hip"' in page and '"name":"attend.py"' in page


def test_graph_breaks_are_told_apart(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "explain", f"{file}:breaks")
    assert "2 sites" in text and len(re.findall(r"^graph \d+/0 of", text, re.M)) == 2
    assert text.count("ends with a graph break: Call to") == 1
    assert "no graph was captured: torch.compile runs" in said(capsys, "explain", f"{file}:loops")


WRONG = {
    "nothing.py:make": "there is no file 'nothing.py'",
    "{file}": "got '{file}'",
    "{file}:nothing": "has no function 'nothing'; it has Attention, Dropped, make, by_name,",
    "{file}:LIMIT": "has no function 'LIMIT'",
    "{file}:wrong": "returned int; allowed: file.py:function",
    "{folder}": "without a config.json",
    "{file}:make --set chunk=100": "option 'chunk': got 100",
    "{file}:make --set chunk": "allowed: OPTION=VALUE",
    "{file}:make --seq-len 0": "--seq-len: got 0; allowed: 1 to 2147483647",
    "{file}:make --seq-len 2147483648": "--seq-len: got 2147483648; allowed: 1 to 2147483647",
    "{file}:make --set dump=there": "option 'dump': got 'there' (str); allowed: for torch.compile",
    "{file}:make --format model-explorer": "got no --out",
    "{file}:make --out /nowhere/at/all": "/nowhere/at/all",
}
FAILED = {
    "{file}:broken": "broken() raised KeyError: 'no weights' at {file}:",
    "{file}:needs": "needs() missing 1 required positional argument: 'x'\n",
    "{file}:stops": "stops() raised SystemExit: 7",
    "{file}:raises": "the model raised ValueError: only for squares at {file}:",
    "{file}:misfits": "the model raised RuntimeError: a and b must have same reduction dim",
    "{file}:misfits_a_line": "the model raised RuntimeError: a and b must have same reduction dim",
    "{bad}:make": "importing it raised SyntaxError",
}


@pytest.mark.parametrize("code, target", [(2, text) for text in WRONG] + [(3, text) for text in FAILED])
def test_bad_input_has_an_exit_code_and_says_what_is_allowed(
    code: int, target: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def make(:\n")
    names = {"file": str(file), "folder": str(tmp_path), "bad": str(bad)}
    arguments = [part.format(**names) for part in target.split()]
    assert (WRONG | FAILED)[target].format(**names) in said(capsys, "diff", *arguments, code=code)


def test_an_operator_that_fails_is_one_line_of_the_users(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Not Dynamo's own words for it, nor torch's log of fake tensors."""
    line = next(at for at, code in enumerate(MODEL.splitlines(), 1) if "torch.zeros(4, 9)" in code)
    assert main(["explain", f"{file}:misfits_a_line"]) == 3
    said = capfd.readouterr().err.strip().splitlines()
    assert len([text for text in said if "noise" not in text]) == 1 and said[-1].endswith(f" at {file}:{line}"), said


def test_a_pipe_is_without_colour_and_may_close(file: Path) -> None:
    """In a process of its own: a terminal is no pipe."""
    root = Path(prescore_compile.__file__).parent.parent
    command = f"{sys.executable} -m prescore_compile.cli diff '{file}:by_name' {' '.join(REWRITE)}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} | head -n 1"],
        cwd=root, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "Broken" not in done.stderr, done.stderr
    assert done.stdout == "graph 0/0\n"


def test_colour_asks_the_terminal_and_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    from prescore_compile.inspection.command import wants_colour

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_colour("auto") and not wants_colour("never")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour("auto") and wants_colour("always")


def test_a_hugging_face_config_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=8192, num_hidden_layers=2)
    config |= dict(num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672, vocab_size=128256)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = json.loads(said(capsys, "explain", tmp_path, "--seq-len", "16384", "--format", "json"))
    sites = [site for graph in found["graphs"] for site in graph["sites"]]
    assert [(site["module"], site["decision"]) for site in sites] == [
        (f"model.layers.{i}.self_attn", "rewrite") for i in range(2)
    ]


SMALL = dict(num_hidden_layers=1, hidden_size=32, intermediate_size=64, num_attention_heads=2)


@pytest.mark.parametrize(
    "config",
    [
        dict(model_type="vit", **SMALL),
        dict(model_type="dinov2", **SMALL),
        dict(model_type="beit", **SMALL),
        dict(model_type="clip", text_config=SMALL, vision_config=SMALL),
        dict(model_type="wav2vec2", **SMALL),
        dict(model_type="whisper", d_model=48, encoder_layers=1, decoder_layers=1),
        dict(model_type="t5", d_model=32, d_kv=16, num_layers=1, num_heads=2),
    ],
    ids=lambda config: config["model_type"],
)
def test_a_hugging_face_config_of_images_and_sound(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it is asked with is what its forward takes."""
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = json.loads(said(capsys, "explain", tmp_path, "--seq-len", "64", "--format", "json"))
    assert [site for graph in found["graphs"] for site in graph["sites"]]


def test_every_site_has_a_line_inside_of_torch_a_checkpoint_and_a_branch() -> None:
    class Inside(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def attend(x: torch.Tensor) -> torch.Tensor:
                return torch.nn.functional.scaled_dot_product_attention(x, x, x)

            x = torch.utils.checkpoint.checkpoint(attend, x, use_reentrant=False)
            return torch.cond(x.shape[-2] == 64, attend, lambda x: x + 1, (x,)) + torch.cond(
                x.sum() > 0, attend, lambda x: x + 1, (x,)
            )

    decoder = torch.nn.TransformerDecoderLayer(32, 2, 64, batch_first=True).eval()
    x = torch.randn(1, 64, 32)
    sites = [*explain(decoder, x, x).sites, *explain(Inside(), torch.randn(1, 2, 64, 8)).sites]
    places = [site.source for site in sites]
    assert len(sites) >= 5 and all(re.search(r"\.py:\d+$", place) for place in places), places
    assert places[0].split(":")[0].endswith("activation.py") and "def forward" in sites[0].code


def test_options_are_not_swallowed_by_a_models_keywords() -> None:
    def swallows(x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    def takes(x: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, scale=options["scale"])

    x = torch.randn(1, 2, 64, 8)
    for look in (explain, graph_diff):
        for model in (swallows, torch.nn.Identity(), torch.compile(torch.nn.Identity())):
            with pytest.raises(OptionError, match=r"'options': got {'exclude'.*allowed: config=Config\(\*\*options\)"):
                look(model, x, options={"exclude": ["*"]})
    assert explain(takes, x, options={"scale": 1.0}).sites


def test_an_inspection_is_data_text_and_json(inspection: Inspection) -> None:
    (difference,) = inspection.diffs
    assert inspection.title == "model" and difference.added and "+ prescore_route_attend" in str(inspection)
    (graph,) = json.loads(inspection.json())["graphs"]
    assert len(graph["matched"]) + len(graph["removed"]) == len(graph["before"])


def test_model_explorer_files(inspection: Inspection, tmp_path: Path) -> None:
    """Two graphs and the mapping, in the shape that the package's own classes have."""
    builder = pytest.importorskip("model_explorer.graph_builder")
    config = pytest.importorskip("model_explorer.config")
    paths = explorer.write(inspection, tmp_path)
    assert [path.name for path in paths] == ["before.json", "after.json", "mapping.json"]

    def build(cls: Any, values: dict[str, Any], **inside: Any) -> Any:
        return cls(
            **{key: [inside[key](v) for v in value] if key in inside else value for key, value in values.items()}
        )

    def node(values: dict[str, Any]) -> Any:
        styled = {"style": builder.GraphNodeStyle(**values["style"])} if "style" in values else {}
        return build(
            builder.GraphNode, values | styled,
            attrs=lambda v: builder.KeyValue(**v), incomingEdges=lambda v: builder.IncomingEdge(**v),
            outputsMetadata=lambda v: build(builder.MetadataItem, v, attrs=lambda w: builder.KeyValue(**w)),
        )  # fmt: skip

    sides = []
    loaded = config.ModelExplorerConfig()
    for path in paths[:2]:
        loaded.add_model_from_path(str(path))
        (graph,) = [build(builder.Graph, values, nodes=node) for values in json.loads(path.read_text())]
        ids = {n.id for n in graph.nodes}
        assert all(edge.sourceNodeId in ids for n in graph.nodes for edge in n.incomingEdges)
        sides.append(ids)
    assert loaded.has_data_to_encode_in_url()
    mapping = json.loads(paths[2].read_text())
    assert set(mapping["mapping"]) <= sides[0] and set(mapping["mapping"].values()) <= sides[1]
    assert mapping["type"] == "sync_navigation"


def test_a_node_of_both_graphs_has_one_id_in_model_explorer(inspection: Inspection, tmp_path: Path) -> None:
    before, after = (
        [node["id"] for node in json.loads(path.read_text())[0]["nodes"]]
        for path in explorer.write(inspection, tmp_path)[:2]
    )
    (difference,) = inspection.diffs
    assert all(before[a] == after[b] for a, b in difference.matched.items())
    assert len(set(before) & set(after)) == len(difference.matched) < len(set(after)) == len(after)


def test_dot_quotes_what_the_model_calls_things(inspection: Inspection) -> None:
    assert dot._quoted('a"b\\c\nd') == '"a\\"b\\\\c\\nd"'
    assert 'style="filled,dashed"' in dot.dot(inspection)
