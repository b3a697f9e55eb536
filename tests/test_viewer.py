"""The HTML page in a real browser; skipped where there is none. CONTRIBUTING.md says how to get one."""

from __future__ import annotations

import operator
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from prescore_compile import Config, Inspection, graph_diff, observe

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")]

EVIL = "</script><script>window['hacked']=1</script><img src=x onerror=window['hacked']=1>"
SHOTS = os.environ.get("PRESCORE_SCREENSHOTS")
"""A folder: pictures of every page are put there, to be looked at."""


class Attention(torch.nn.Module):
    def __init__(self, prefix: int = 0) -> None:
        super().__init__()
        self.prefix, self.out = prefix, torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[2])
        mask = at[None, :] <= at[:, None]
        if self.prefix:
            mask = mask | (at[None, :] < self.prefix)
        return x + self.out(F.scaled_dot_product_attention(x, x, x, mask))


def thirty() -> Inspection:
    model = torch.nn.Sequential(*(Attention(prefix=9 if i % 3 == 1 else 0) for i in range(29)))
    model.add_module(EVIL, Attention())
    return graph_diff(model, torch.randn(1, 2, 64, 8), config=Config(min_seq_len=0, only_if_faster=False))


def ten_thousand() -> Inspection:
    graph = fx.Graph()
    x = graph.placeholder("x")
    hidden = x
    for i in range(2500):
        for target in (torch.relu, torch.tanh, torch.exp):
            hidden = graph.call_function(target, (hidden,))
            hidden.meta["stack_trace"] = (
                f'  File "/home/me/model.py", line {i}, in forward\n    x = {target.__name__}(x)\n'
            )
            hidden.meta["nn_module_stack"] = {"": (f"L['self'].layers.{i}", torch.nn.Module)}
        hidden = graph.call_function(operator.add, (hidden, x))
    graph.output(hidden)

    def change(gm: fx.GraphModule) -> None:
        for node in gm.graph.find_nodes(op="call_function", target=torch.tanh)[::50]:
            with gm.graph.inserting_after(node):
                new = gm.graph.call_function(torch.sigmoid, (node.args[0],))
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)

    with observe() as log:
        log.run(change, fx.GraphModule(torch.nn.Module(), graph))
    return Inspection("ten thousand", log)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch._dynamo.reset()
    home = tmp_path_factory.mktemp("pages")
    for name, inspection in (("thirty", thirty()), ("thousands", ten_thousand())):
        (home / f"{name}.html").write_text(inspection.html(), encoding="utf-8")
    return home


def opened(browser: Any, file: Path, **context: Any) -> tuple[Any, list[str], float]:
    """The page, what went wrong in it or was asked of the network, and the seconds until it was ready."""
    page = browser.new_context(viewport={"width": 1440, "height": 900}, **context).new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url == file.as_uri() else wrong.append(request.url))
    start = time.perf_counter()
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready] #canvas .row")
    return page, wrong, time.perf_counter() - start


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_thirty_layers(browser: Any, folder: Path, scheme: str) -> None:
    page, wrong, _ = opened(browser, folder / "thirty.html", color_scheme=scheme)
    assert page.get_attribute("html", "data-theme") == scheme
    shot(page, f"thirty-{scheme}")
    page.keyboard.press("2")
    assert page.locator("#body tr").count() == 30
    page.get_by_role("button", name="unsupported_mask 10").click()
    assert page.locator("#body tr").count() == 10 and page.locator("#body .math").first.inner_text().startswith(
        "k ≤ 8 ∨"
    )
    shot(page, f"decisions-{scheme}")
    page.get_by_role("button", name="module", exact=True).click()
    modules = page.locator("#body td:first-child").all_inner_texts()
    assert modules == sorted(modules, key=int)
    page.locator("#body tr").first.click()
    assert "kept exact: unsupported_mask: k <= 8 or k <= q" in page.locator("#detail").inner_text()
    assert page.locator(".row.selected .badge.keep").inner_text() == "kept: unsupported_mask"
    page.locator(".row.selected").hover()
    assert "mask" in page.locator("#tip").inner_text() and __file__ in page.locator("#tip").inner_text()
    shot(page, f"site-{scheme}")
    page.keyboard.press("t")
    assert page.get_attribute("html", "data-theme") != scheme
    page.keyboard.press("3")
    assert page.locator(".source .word").count() > 100 and "20 sites" in page.locator(".users").inner_text()
    shot(page, f"kernels-{scheme}")
    assert not wrong


def test_what_the_model_calls_things_is_text(browser: Any, folder: Path) -> None:
    page, wrong, _ = opened(browser, folder / "thirty.html")
    page.fill("#search", "<script>window")
    sync_api.expect(page.locator("#hits")).to_have_text(re.compile(r"[1-9]\d* found"))
    page.press("#search", "Enter")
    assert "<script>window" in page.locator("#detail").inner_text()
    page.keyboard.press("Escape")
    page.locator("#tab-decisions").click()
    page.locator(".row").count()
    assert page.evaluate("window.hacked") is None and page.locator("img").count() == 0 and not wrong
    assert "<script>window" not in (folder / "thirty.html").read_text().replace("\\u003c", "?")


def test_ten_thousand_nodes_open_and_do_not_freeze(browser: Any, folder: Path) -> None:
    file = folder / "thousands.html"
    page, wrong, seconds = opened(browser, file)
    assert seconds < 3 and file.stat().st_size < 5e6, (seconds, file.stat().st_size)
    shot(page, "thousands")
    assert page.locator("#canvas > *").count() < 200
    assert page.locator(".fold").first.inner_text().startswith("⋯ ")
    start = time.perf_counter()
    page.keyboard.press("e")
    page.locator("#scroller").evaluate("area => area.scrollTop = area.scrollHeight")
    page.get_by_text("return add_2499").first.wait_for()
    assert page.locator("#canvas > *").count() < 200
    page.fill("#search", "layers.1249")
    sync_api.expect(page.locator("#hits")).to_have_text("3 found")
    page.press("#search", "Enter")
    assert "layers.1249" in page.locator("#detail").inner_text()
    page.keyboard.press("Escape")
    page.keyboard.press("n")
    assert page.locator(".removed.selected, .added.selected").count() == 1
    shot(page, "thousands-change")
    assert time.perf_counter() - start < 5 and not wrong


def test_keys_and_links(browser: Any, folder: Path) -> None:
    page, wrong, _ = opened(browser, folder / "thirty.html")
    page.keyboard.press("n")
    first = page.locator(".row.selected").get_attribute("data-row")
    page.keyboard.press("n")
    page.keyboard.press("p")
    assert page.locator(".row.selected").get_attribute("data-row") == first
    page.keyboard.press("j")
    assert page.locator(".row.selected").get_attribute("data-row") == str(int(first) + 1)
    page.locator("#detail .link").first.click()
    assert page.locator(".row.selected").count() == 1
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.locator("#close").click()
    before = page.locator("#canvas").evaluate("node => node.offsetHeight")
    page.locator(".fold").first.click()
    assert page.locator("#canvas").evaluate("node => node.offsetHeight") > before
    page.select_option("#view", index=1)
    assert page.locator("#left").inner_text().startswith("decided") and not wrong
