"""Counts the attentions that really run in one eager forward, and shares nothing with the matcher.

A dispatch mode records every operator that runs and which tensors it read. An attention is then

- a call of ``F.scaled_dot_product_attention``, however it is reached and whatever it runs as: one of its
  kernels, or matmul, softmax and matmul under one Python instruction (its math path);
- a fused module (``torch._native_multi_head_attention``, the encoder layer's fast path); or
- hand-written: a softmax whose input comes from a matmul of two activations through elementwise and
  view operators, and whose output reaches, likewise, a matmul with a third activation that sums over
  the softmax's axis.

Softmaxes that are not are told apart with the reason, for a reader to judge.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

MATMULS = {"mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "addmm": (1, 2), "addmv": (1, 2), "baddbmm": (1, 2)}
"""Which arguments are multiplied. matmul, linear and einsum become these before they are recorded."""
SOFTMAXES = ("_softmax", "_safe_softmax", "_masked_softmax")
FUSED = ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")
COMPUTE = ("conv", "_norm", "lstm", "gru", "rnn", "fft", "cdist", "grid_sampler")
"""Parts of names: what these return is an activation, even of parameters alone."""
REDUCTIONS = (
    "sum mean amax amin max min argmax argmin logsumexp prod var std topk sort argsort cumsum cumprod median "
    "any all norm linalg_vector_norm nonzero unique _unique2 bincount histc kthvalue var_mean embedding "
    "_log_softmax multinomial searchsorted bucketize max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d "
    "avg_pool1d avg_pool3d _cdist_forward"
).split()


@dataclass(frozen=True)
class Attention:
    """One attention that ran.

    ``kind`` is "sdpa", "fused" or "hand"; ``lines`` are the ``file:line`` of its score matmul, softmax and
    value matmul, or of the call; ``shape`` is that of the softmax's input (of the query, for a kernel).
    """

    kind: str
    lines: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Lookalike:
    """A softmax that is not the middle of an attention, and why not."""

    reason: str
    line: str
    shape: tuple[int, ...]


@dataclass
class _Call:
    """An operator that ran. ``instruction`` is the Python instruction that called it."""

    name: str
    reads: list[tuple[int, ...]]  # for each tensor argument, the calls that it comes from
    operands: tuple[int, ...] = ()  # of a matmul: the multiplied ones among ``reads``
    instruction: tuple[int, ...] = ()
    line: str = ""
    shape: tuple[int, ...] = ()
    activation: bool = False
    softmax: bool = False  # is, or comes by elementwise steps from, a softmax
    axis: int = 0  # length of a softmax's axis
    sums: dict[int, tuple[bool, bool, int, int]] = field(default_factory=dict)


class Watch(TorchDispatchMode):
    """Records one forward: ``with Watch(inputs) as watch: model(**inputs)``, then ``watch.attentions()``."""

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._made: dict[int, int] = {}
        self._written: dict[int, list[int]] = {}
        self._held: list[torch.Tensor] = []  # these and the frames are held so that no id is used twice
        self._frames: list[Any] = []
        self._inputs = {_storage(t) for t in tree_iter(inputs) if isinstance(t, torch.Tensor)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors(args)) + list(_tensors(kwargs.values()))
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        base = name.rstrip("_") or name
        call = _Call(base, [self._sources(t) for t in tensors])
        call.activation, call.softmax = self._nature(call)
        if base in MATMULS or base in SOFTMAXES or base in FUSED or "scaled_dot_product" in base:
            frame, call.line = _where(sys._getframe(1))
            self._frames.append(frame)
            call.instruction = (id(frame), frame.f_lasti)
            call.shape = tuple(tensors[0].shape)
        if base in MATMULS:
            call.operands = MATMULS[base]
            self._sum(call, tensors)
        if base in SOFTMAXES:
            call.softmax, call.axis = True, tensors[0].shape[args[1]] if tensors[0].dim() else 1
        result = func(*args, **kwargs)
        at = len(self.calls)
        self.calls.append(call)
        read = {id(t) for t in tensors}
        for out in _tensors([result]):
            self._held.append(out)
            self._made[id(out)] = at
            if id(out) in read:  # written in place: seen through every view of its storage
                self._written.setdefault(_storage(out), []).append(at)
        return result

    def _sources(self, tensor: torch.Tensor) -> tuple[int, ...]:
        key = id(tensor)
        if key not in self._made:
            self._held.append(tensor)
            is_input = _storage(tensor) in self._inputs
            self._made[key] = len(self.calls)
            self.calls.append(_Call("input" if is_input else "constant", [], activation=is_input))
        return tuple({self._made[key], *self._written.get(_storage(tensor), ())})

    def _nature(self, call: _Call) -> tuple[bool, bool]:
        """Whether the result is an activation, and whether a softmax is passed on."""
        sources = [self.calls[i] for read in call.reads for i in read]
        computed = call.name in MATMULS or any(part in call.name for part in COMPUTE)
        return computed or any(s.activation for s in sources), _passes(call) and any(s.softmax for s in sources)

    def _sum(self, call: _Call, tensors: list[torch.Tensor]) -> None:
        """For an operand that comes from a softmax: does it sum to one over the contracted axis, or the other?"""
        for position in call.operands:
            operand = tensors[position]
            if not any(self.calls[i].softmax for i in call.reads[position]) or operand.dim() < 2:
                continue
            inner = -1 if position == call.operands[0] else -2
            outer = -3 - inner
            call.sums[position] = (
                _is_one(operand.sum(inner)),
                _is_one(operand.sum(outer)),
                operand.shape[inner],
                operand.shape[outer],
            )

    def attentions(self) -> list[Attention]:
        return self._sort()[0]

    def lookalikes(self) -> list[Lookalike]:
        return self._sort()[1]

    def _sort(self) -> tuple[list[Attention], list[Lookalike]]:
        readers: dict[int, list[int]] = {}
        for at, call in enumerate(self.calls):
            for source in {i for read in call.reads for i in read}:
                readers.setdefault(source, []).append(at)
        found: list[Attention] = []
        others: list[Lookalike] = []
        for at, call in enumerate(self.calls):
            if call.name in FUSED or "scaled_dot_product" in call.name:
                kind = "fused" if call.name in FUSED else "sdpa"
                found.append(Attention(kind, (call.line,), call.shape))
            elif call.name in SOFTMAXES:
                verdict = self._judge(at, readers)
                (found if isinstance(verdict, Attention) else others).append(verdict)  # type: ignore[arg-type]
        return found, others

    def _judge(self, at: int, readers: dict[int, list[int]]) -> Attention | Lookalike:
        softmax = self.calls[at]
        scores = self._scores(at)
        if any(self.calls[i].instruction == softmax.instruction for i in scores):
            return Attention("sdpa", (softmax.line,), softmax.shape)
        products = [i for i in scores if self._of_activations(i)]
        values, reason = self._values(at, readers)
        if not scores:
            reason = "no matmul before it"
        elif not products:
            reason = "scores are a layer's output or a product with a parameter"
        if reason:
            return Lookalike(reason, softmax.line, softmax.shape)
        lines = [self.calls[i].line for i in (*products, at, *values)]
        return Attention("hand", tuple(dict.fromkeys(lines)), softmax.shape)

    def _scores(self, at: int) -> list[int]:
        """The matmuls that the softmax's input comes from by elementwise and view steps, nearest first."""
        found, seen, todo = [], {at}, [i for read in self.calls[at].reads for i in read]
        while todo:
            here = todo.pop()
            if here in seen or here > at:
                continue
            seen.add(here)
            if self.calls[here].name in MATMULS:
                found.append(here)
            elif _passes(self.calls[here]):
                todo += [i for read in self.calls[here].reads for i in read]
        return sorted(found, reverse=True)

    def _of_activations(self, at: int) -> bool:
        call = self.calls[at]
        return all(any(self.calls[i].activation for i in call.reads[position]) for position in call.operands)

    def _values(self, at: int, readers: dict[int, list[int]]) -> tuple[list[int], str]:
        """The value matmuls that the softmax's output reaches, or the reason why there is none."""
        found, reason, seen, todo = [], "no matmul after it", set(), list(readers.get(at, ()))
        came = {at}  # what carries the softmax's output
        while todo:
            here = heapq.heappop(todo)
            if here in seen:
                continue
            seen.add(here)
            call = self.calls[here]
            if call.name in MATMULS:
                verdict = self._contracts(call, came, self.calls[at].axis)
                found += [] if verdict else [here]
                reason = verdict or reason
            elif _passes(call):
                came.add(here)
                for reader in readers.get(here, ()):
                    heapq.heappush(todo, reader)
        return found, "" if found else reason

    def _contracts(self, call: _Call, came: set[int], axis: int) -> str:
        """ "" where the matmul weighs an activation along the softmax's axis, or else what it does."""
        left, right = call.operands
        if came.intersection(call.reads[left]):
            position, other = left, right
        elif came.intersection(call.reads[right]):
            position, other = right, left
        else:
            return "only added to a matmul's result"
        if not any(self.calls[i].activation for i in call.reads[other]):
            return "multiplied with a parameter or constant"
        inner_one, outer_one, inner, outer = call.sums.get(position, (True, False, axis, 0))
        # Sums decide where they can; dropped sinks or masked rows leave the lengths.
        wrong = not inner_one and (outer_one or (outer == axis and inner != axis))
        return "sums over another axis than the softmax's" if wrong else ""


def watch(model: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Watch]:
    """Runs ``model(*args, **kwargs)`` once, without gradients, and what was seen."""
    with torch.no_grad(), Watch((args, kwargs)) as seen:
        result = model(*args, **kwargs)
    return result, seen


def _passes(call: _Call) -> bool:
    """Whether the operator is elementwise, a view, a copy, a cast or the like."""
    name = call.name
    barrier = name in MATMULS or name in SOFTMAXES or name in REDUCTIONS or name in FUSED
    return not barrier and "scaled_dot_product" not in name and not any(part in name for part in COMPUTE)


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _storage(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without one
        return id(tensor)


def _is_one(sums: torch.Tensor) -> bool:
    """Whether (nearly) every sum is one; masked rows may sum to nothing."""
    near = ((sums - 1).abs() < 1e-3) | (sums.abs() < 1e-6)
    return bool(near.all()) and bool((sums.abs() > 0.5).any())


def _where(frame: Any) -> tuple[Any, str]:
    """The Python frame that called, and the innermost line outside torch (or inside, for lack of one)."""
    while frame is not None and frame.f_code.co_filename in _OWN:
        frame = frame.f_back
    caller = frame
    line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    while frame is not None:
        if _TORCH not in frame.f_code.co_filename:
            return caller, f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return caller, line


_TORCH = torch.__file__.removesuffix("__init__.py")
_OWN = {__file__, *(_TORCH + part for part in ("_compile.py", "_dynamo/eval_frame.py", "utils/_python_dispatch.py"))}
"""The frames between the call and this file."""
