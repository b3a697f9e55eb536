"""docs/census.md from the rows of a census: what was measured, for readers.

python -m bench.census_page    # from bench/results/census.json
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "bench" / "results" / "census.json", ROOT / "docs" / "census.md"
Row = dict[str, Any]

_HEAD = """# The census

Every model family that the installed transformers ({transformers}) can build tiny from its config, with
`attn_implementation` "eager" and "sdpa"; architectures of timm; and torch's own attention modules. Each
runs once under an oracle that shares no code with the matcher: it watches tensors at run time and counts
fused calls, and softmaxes that stand between two matmuls. Then it is compiled (torch {torch}, CPU) with the
plan that keeps everything, and the outputs must equal the eager model's within 1e-4 of their largest value.

```
python -m bench.census --jobs 2    # an hour or two on two cores; stops and goes on; writes bench/results/census.json
python -m bench.census --sample    # the fixed sample that `make test` runs, with gradients
python -m bench.census_page        # this page
```
"""
_WORDS = """
**Ran** is what the oracle counted: `sdpa` is a call of `F.scaled_dot_product_attention`, `fused` a fused kernel
behind a module of torch, `hand` is written out. **Kept** is kept exact, by [reason](reasons.md). **Missed** ran
inside a graph of Dynamo and has no site. **Wrong** is an error beyond the tolerance and beyond what one rounding
of the weights explains; superglue is the one: it ends in a choice (two points match where each is the other's best),
and where two scores are nearly equal a rounding decides. Where the eager model gives NaN (hand-written attention of a
query whose keys are all hidden by -inf; it gets 0 here, as from SDPA) nothing is compared. An attention **outside**
graphs runs between two of them (a graph break), where no compiler sees it.
"""

_NOT_BUILT = """
## Not built

Families whose tiny config or inputs the census does not know how to make, each with its first error. Families
without the implementation that was asked for are not listed.
"""


def page(about: Row, rows: list[Row]) -> str:
    """The page in Markdown."""
    built = [row for row in rows if "unbuilt" not in row]
    seen = [row for row in built if "found" in row]
    parts = [_HEAD.format(**about), _table(_totals(rows, built, seen)), _WORDS, "## Kept, by reason\n"]
    kept = _added(seen, "kept")
    families = {code: len({row["family"] for row in seen if code in row["kept"]}) for code in kept}
    parts.append(_table([{"reason": f"`{code}`", "sites": n, "families": families[code]} for code, n in kept.items()]))
    parts += ["\n## Family by family\n", _table([_line(row) for row in built])]
    left = [row for row in rows if _unbuildable(row)]
    parts.append(_NOT_BUILT)
    lines = [{"family": r["family"], "impl": r["implementation"], "error": _cell(r["unbuilt"][:120])} for r in left]
    parts.append(_table(lines) if lines else "None.")
    return "\n".join(parts) + "\n"


def _totals(rows: list[Row], built: list[Row], seen: list[Row]) -> list[Row]:
    ran, missed = _added(seen, "ran"), Counter()
    for row in seen:
        missed.update(missed_inside(row))
    calls = [kind for kind in ran if kind != "hand"]
    lines = {
        "families built": len({row["family"] for row in built}),
        "models run (family and implementation)": len(built),
        "not built": sum(map(_unbuildable, rows)),
        "failed in the backend, or not compiled by Dynamo": sum("failed" in r or "uncompiled" in r for r in built),
        "fused and SDPA calls that ran": sum(ran[kind] for kind in calls),
        "... missed": _share(sum(missed[kind] for kind in calls), sum(ran[kind] for kind in calls)),
        "hand-written attentions that ran": ran["hand"],
        "... missed ": _share(missed["hand"], ran["hand"]),
        "outside graphs": sum(row.get("outside", 0) for row in seen),
        "sites found": sum(row["found"] for row in seen),
        "... rewritten": sum(row["rewritten"] for row in seen),
        "... kept exact": sum(_added(seen, "kept").values()),
        "... where the oracle sees no attention (kept, too)": sum(row["extra"] for row in seen),
        "wrong outputs": sum(bool(row.get("wrong")) for row in built),
        "outputs that differ from run to run without us": sum(bool(row.get("unsteady")) for row in built),
        "outputs that one rounding of the weights changes as much": sum("sensitivity" in r and not r.get("wrong")
                                                                        for r in built),
        "lookalikes that the oracle saw": sum(sum(row["lookalikes"].values()) for row in seen),
    }  # fmt: skip
    return [{"": name.strip(), "measured": value} for name, value in lines.items()]


def missed_inside(row: Row) -> dict[str, int]:
    """Attentions of a row without a site, less those that run outside graphs."""
    found = {kind: n for kind, n in row.get("missed", {}).items() if n}
    outside = row.get("outside", 0)
    for kind in found:
        less = min(found[kind], outside)
        found[kind], outside = found[kind] - less, outside - less
    return found


def _share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / max(whole, 1):.1f} %)"


def _added(rows: list[Row], key: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row.get(key) or {})
    return Counter(dict(total.most_common()))


def _line(row: Row) -> Row:
    def counts(found: dict[str, int]) -> str:
        return ", ".join(f"{n} {name}" for name, n in found.items() if n) or "-"

    words = [word for word in ("failed", "uncompiled", "wrong", "unsteady") if row.get(word)]
    error = f"{row['error']:.0e}" if "error" in row else ""
    return {
        "family": row["family"],
        "impl": row["implementation"],
        "ran": counts(row.get("ran", {})),
        "found": row.get("found", "-"),
        "rewritten": row.get("rewritten", "-"),
        "kept": counts(row.get("kept", {})),
        "missed": counts(missed_inside(row)),
        "outside": row.get("outside") or "-",
        "error": " ".join([error, *words, *(["rounding"] if "sensitivity" in row else [])]),
    }


def _unbuildable(row: Row) -> bool:
    return "unbuilt" in row and "does not support an attention implementation" not in row["unbuilt"]


def _cell(text: str) -> str:
    return "`" + text.replace("|", "/").replace("`", "'") + "`"


def _table(rows: list[Row]) -> str:
    return str(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


def main() -> None:
    found = json.loads(RESULTS.read_text())
    PAGE.write_text(page(found["about"], found["rows"]))
    print(f"{PAGE.relative_to(ROOT)}: {len(found['rows'])} rows")


if __name__ == "__main__":
    main()
