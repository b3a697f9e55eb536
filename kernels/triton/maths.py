"""Lifted masks and biases, sympy expressions over b, h, q and k, as Triton expressions.

In a kernel ``b`` is a number, ``h`` and ``q`` are columns (one value a row of the tile) and ``k`` is a row
(one value a key), all inside the sequence, so that what a tensor is asked for is always there. A
tensor that the expression reads, ``document[b, k]``, becomes a load; ``mask_document`` and its strides
become parameters of the kernel.
"""

from __future__ import annotations

import ast
from typing import Any

import sympy
from sympy.core.function import AppliedUndef
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter

from ..band import K, Q, band
from .spec import Lifted, parameter

SYMBOLS = frozenset(["b", "h", "q", "k", "c", "k_low", "k_high"])
"""The last three are a chunk and its first and last key, for ``route``."""


def lifted(allowed: Any = sympy.true, bias: Any = 0) -> Lifted:
    """What ``spec.Lifted`` holds of a mask.

    Args:
        allowed: where a pair is attended, a bool expression over ``b``, ``h``, ``q``, ``k`` (symbols of these
            names) and tensors (undefined functions of them). bias: what is added to the logits there.

    Raises:
        ValueError: an expression that is not made of what the printer knows, naming the part.
    """
    allowed, bias = sympy.sympify(allowed), sympy.sympify(bias)
    loads: dict[str, int] = {}
    for expr in (allowed, bias):
        for symbol in expr.free_symbols:
            if str(symbol) not in SYMBOLS:
                raise ValueError(f"mask {expr}: got the symbol {symbol}; allowed: b, h, q, k")
        for atom in sorted(expr.atoms(AppliedUndef), key=str):
            name = atom.func.__name__
            if not name.isidentifier():
                raise ValueError(f"mask {expr}: got the tensor {name!r}; allowed: a name that is an identifier")
            if loads.setdefault(name, len(atom.args)) != len(atom.args):
                raise ValueError(f"mask {expr}: got {name} with {len(atom.args)} axes and with {loads[name]}")
    return Lifted(
        allowed="" if allowed == sympy.true else triton_text(allowed),
        bias="" if bias == 0 else triton_text(bias),
        loads=tuple(sorted(loads.items())),
        **_bounds(allowed),
    )


def _bounds(allowed: Any) -> dict[str, Any]:
    """The fields of ``Lifted`` that bound the loops."""
    keys, queries = band(allowed, K, Q), band(allowed, Q, K)
    found = {
        "low": (keys.low, Q, "queried"),
        "high": (keys.high, Q, "queried"),
        "query_low": (queries.low, K, "begin_key"),
        "query_high": (queries.high, K, "last_key"),
    }
    texts: dict[str, Any] = {
        name: "" if end is None else triton_text(end.subs(of, sympy.Symbol(at, integer=True, nonnegative=True)))
        for name, (end, of, at) in found.items()
    }
    return texts | {"only": bool(texts["low"] or texts["high"]) and keys.rest == sympy.true}


def triton_text(expr: Any) -> str:
    """The expression as Triton source.

    Raises:
        ValueError: a part that the printer does not know. SyntaxError: one that it prints wrongly.
    """
    text = str(_Printer().doprint(sympy.sympify(expr)))
    ast.parse(text, mode="eval")
    return text


def factored(total: Any) -> tuple[Any, Any] | None:
    """A sum whose terms all have one factor, ``c*k - c*q``, as that factor and ``k - q``; None for any other.

    sympy multiplies numbers out, which would lose a difference of large indices to rounding.
    """
    parts = [term.as_coeff_Mul() for term in total.args]
    factor = abs(parts[0][0])
    if factor == 1 or any(abs(number) != factor for number, _ in parts):
        return None
    return factor, sympy.Add(*(rest if number > 0 else -rest for number, rest in parts))


class _Printer(StrPrinter):  # type: ignore[misc]
    def emptyPrinter(self, expr: Any) -> str:
        raise ValueError(f"mask: got {expr} ({type(expr).__name__}); allowed: what kernels.triton.maths prints")

    def _print_Symbol(self, expr: Any) -> str:
        return str(expr.name)

    def _print_Function(self, expr: Any) -> str:
        return self.emptyPrinter(expr)

    def _print_BooleanTrue(self, expr: Any) -> str:
        return "(k >= 0)"

    def _print_BooleanFalse(self, expr: Any) -> str:
        return "(k < 0)"

    def _print_Add(self, expr: Any, order: Any = None) -> str:
        found = factored(expr)
        if found is None:
            return str(super()._print_Add(expr, order))
        return f"{self._print(found[0])} * ({super()._print_Add(found[1], order)})"

    def _print_And(self, expr: Any) -> str:
        return f"({' & '.join(sorted(map(self._print, expr.args)))})"

    def _print_Or(self, expr: Any) -> str:
        return f"({' | '.join(sorted(map(self._print, expr.args)))})"

    def _print_Xor(self, expr: Any) -> str:
        return f"({' ^ '.join(sorted(map(self._print, expr.args)))})"

    def _print_Not(self, expr: Any) -> str:
        return f"({self._print(expr.args[0])} == 0)"

    def _print_Relational(self, expr: Any) -> str:
        return f"({self._print(expr.lhs)} {expr.rel_op} {self._print(expr.rhs)})"

    def _print_floor(self, expr: Any) -> str:
        above, below = sympy.fraction(sympy.together(expr.args[0]))
        if not (below.is_Integer and below > 0 and above.is_integer):
            return self.emptyPrinter(expr)
        return self._divided(above, below)[0]

    def _print_Mod(self, expr: Any) -> str:
        above, below = expr.args
        if not (below.is_Integer and below > 0 and above.is_integer):
            return self.emptyPrinter(expr)
        return self._divided(above, below)[1]

    def _divided(self, above: Any, below: Any) -> tuple[str, str]:
        """Quotient and remainder, rounded down: Triton rounds towards 0, as C does."""
        text = self.parenthesize(above, PRECEDENCE["Mul"], strict=True)
        if above.is_nonnegative:
            return f"({text} // {below})", f"({text} % {below})"
        remainder = f"((({text} % {below}) + {below}) % {below})"
        return f"(({text} - {remainder}) // {below})", remainder

    def _print_AppliedUndef(self, expr: Any) -> str:
        name = parameter(expr.func.__name__)
        at = [f"tl.cast({self._print(arg)}, tl.int64) * {name}_{axis}" for axis, arg in enumerate(expr.args)]
        return f"tl.load({' + '.join([name, *at])})"

    def _print_Abs(self, expr: Any) -> str:
        return f"tl.abs({self._print(expr.args[0])})"

    def _print_Max(self, expr: Any) -> str:
        return self._pairwise("tl.maximum", expr)

    def _print_Min(self, expr: Any) -> str:
        return self._pairwise("tl.minimum", expr)

    def _pairwise(self, name: str, expr: Any) -> str:
        first, *rest = sorted(map(self._print, expr.args))
        for part in rest:
            first = f"{name}({first}, {part})"
        return first

    def _print_Piecewise(self, expr: Any) -> str:
        *parts, (last, condition) = expr.args
        text = self._print(last)
        if condition != sympy.true:
            return self.emptyPrinter(expr)
        for value, where in reversed(parts):
            text = f"tl.where({self._print(where)}, {self._print(value)}, {text})"
        return text

    def _print_exp(self, expr: Any) -> str:
        return f"tl.exp(tl.cast({self._print(expr.args[0])}, tl.float32))"

    def _print_log(self, expr: Any) -> str:
        return f"tl.log(tl.cast({self._print(expr.args[0])}, tl.float32))"

    def _print_Pow(self, expr: Any, rational: bool = False) -> str:
        base, power = expr.args
        if power.is_Integer and 0 < power <= 4:
            return "(" + " * ".join([self.parenthesize(base, PRECEDENCE["Mul"], strict=True)] * int(power)) + ")"
        if base.is_number and base.is_positive:  # slopes: 2**(-h/2)
            return f"tl.exp2(({self._print(power)}) * {float(sympy.log(base, 2))})"
        return self.emptyPrinter(expr)

    def _print_Rational(self, expr: Any) -> str:
        return str(int(expr)) if expr.is_Integer else repr(float(expr))

    def _print_Float(self, expr: Any) -> str:
        return repr(float(expr))

    def _print_Infinity(self, expr: Any) -> str:
        return 'float("inf")'

    def _print_NegativeInfinity(self, expr: Any) -> str:
        return 'float("-inf")'
