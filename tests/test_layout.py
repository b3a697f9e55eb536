from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prescore_compile.kernels.layout import segments, spans
from prescore_compile.kernels.plan import Plan


@given(st.integers(0, 5000))
def test_segments_tile_the_prefix(prefix: int) -> None:
    covered = []
    for name in segments(prefix):
        size = (name + 1) & -(name + 1)
        covered += range(name + 1 - size, name + 1)
    assert sorted(covered) == list(range(prefix))
    assert len(segments(prefix)) == prefix.bit_count()


@given(st.integers(1, 700), st.integers(0, 200), st.sampled_from([16, 64, 128]), st.booleans(), st.integers(1, 99))
def test_spans_agree_with_the_definition(n: int, window: int, chunk: int, causal: bool, tile: int) -> None:
    plan = Plan(chunk=chunk, window=window)
    seen = []
    for span in spans(plan, causal, n, n, tile):
        assert span.end - span.begin <= tile
        for i in range(span.begin, span.end):
            low = max(0, (i - window) // chunk * chunk)
            if causal:
                assert span.low == low and span.finished == low // chunk
            elif window:
                assert (span.low, span.high) == (low, min(n, ((i + window) // chunk + 1) * chunk))
            else:
                assert span.low >= span.high
            seen.append(i)
    assert seen == list(range(n))


def test_no_window_limit_sees_everything() -> None:
    for span in spans(Plan(window=None), True, 100, 100, 32):
        assert (span.low, span.high, span.finished) == (0, 100, 0)
