"""The operators that the graph pass inserts: score, summarize, mass, route, attend; attend_recognized; attend_few;
attend_uniform.

Registered with ``torch.library`` under ``prescore::``, with fake implementations (shapes only) and
gradients, so that Inductor, AOTAutograd and ``torch.export`` see them. A plan travels as
its text. On a CPU mass, route and attend are lowered to one, route_attend. On a GPU the generated Triton kernels
run: an operator made of them is a ``triton_op``, which a compiler takes apart into their launches, so that
Inductor and CUDA graphs have them. On a CPU the compiled kernels run where they can; anything else runs the
reference.
"""

from __future__ import annotations

from .attending import attend, attend_backward, attend_backward_eager, attend_eager, attend_forward
from .composed import prescored
from .continuing import attend_few
from .fused import route_attend
from .recognizing import attend_recognized
from .routing import mass, mass_eager, route, route_eager, routes_of
from .scoring import score, score_eager
from .summarizing import rows, rows_backward, rows_backward_eager, summarize, summarize_eager
from .uniform import attend_uniform, attend_uniform_backward

__all__ = [
    "attend",
    "attend_backward",
    "attend_backward_eager",
    "attend_eager",
    "attend_few",
    "attend_forward",
    "attend_recognized",
    "attend_uniform",
    "attend_uniform_backward",
    "mass",
    "mass_eager",
    "prescored",
    "route",
    "route_attend",
    "route_eager",
    "routes_of",
    "rows",
    "rows_backward",
    "rows_backward_eager",
    "score",
    "score_eager",
    "summarize",
    "summarize_eager",
]
