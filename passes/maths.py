"""Lifted expressions as a reader would write them."""

from __future__ import annotations

from typing import Any

import sympy
from sympy.core.function import AppliedUndef
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter

_MOST_ATOMS = 6
"""Comparisons in a truth value that is simplified: the work doubles with each."""


class _Printer(StrPrinter):  # type: ignore[misc]
    """``k <= q and valid[b, k]``, ``k//8 == q//8``, ``slope[h]*(k - q)``."""

    def _print_And(self, expr: Any) -> str:
        return " and ".join(sorted(self._inner(a, sympy.Or) for a in expr.args))

    def _print_Or(self, expr: Any) -> str:
        return " or ".join(sorted(self._inner(a, sympy.And) for a in expr.args))

    def _print_Xor(self, expr: Any) -> str:
        return " xor ".join(sorted(f"({self._print(a)})" for a in expr.args))

    def _inner(self, expr: Any, other: type) -> str:
        return f"({self._print(expr)})" if isinstance(expr, other) else self._print(expr)

    def _print_Not(self, expr: Any) -> str:
        return f"not ({self._print(expr.args[0])})"

    def _print_Relational(self, expr: Any) -> str:
        if isinstance(expr, sympy.Ne) and expr.rhs == 0 and isinstance(expr.lhs, AppliedUndef):
            return self._print(expr.lhs)
        if isinstance(expr, sympy.Eq) and expr.rhs == 0 and isinstance(expr.lhs, AppliedUndef):
            return f"not {self._print(expr.lhs)}"
        if isinstance(expr, (sympy.Ge, sympy.Gt)):
            expr = expr.reversed
        left, right = self._print(expr.lhs), self._print(expr.rhs)
        if expr.rel_op in ("==", "!=") and left > right:
            left, right = right, left
        return f"{left} {expr.rel_op} {right}"

    def _print_Add(self, expr: Any, order: Any = None) -> str:
        """Terms without a minus first: ``q - k``."""
        terms = sorted(self._as_ordered_terms(expr, order=order), key=lambda term: term.could_extract_minus_sign())
        found = ""
        for term in terms:
            text = f"({self._print(term)})" if isinstance(term, sympy.Mod) else self._print(term)
            if not found:
                found = text
            else:
                found += f" - {text[1:].lstrip()}" if text.startswith("-") else f" + {text}"
        return found

    def _print_floor(self, expr: Any) -> str:
        above, below = sympy.fraction(sympy.together(expr.args[0]))
        if below == 1:
            return f"floor({self._print(expr.args[0])})"
        text = self._print(above)
        if not (above.is_Atom or isinstance(above, AppliedUndef)):
            text = f"({text})"
        return f"{text}//{self._print(below)}"

    def _print_Mod(self, expr: Any) -> str:
        left, right = (self.parenthesize(a, PRECEDENCE["Mul"], strict=True) for a in expr.args)
        return f"{left} % {right}"

    def parenthesize(self, item: Any, level: int, strict: bool = False) -> str:
        if isinstance(item, (sympy.floor, sympy.Mod)) and level >= PRECEDENCE["Mul"]:
            return f"({self._print(item)})"
        return str(super().parenthesize(item, level, strict=strict))

    def _print_AppliedUndef(self, expr: Any) -> str:
        return f"{expr.func.__name__}[{', '.join(self._print(a) for a in expr.args)}]"

    def _print_Abs(self, expr: Any) -> str:
        return f"abs({self._print(expr.args[0])})"

    def _print_Piecewise(self, expr: Any) -> str:
        parts = [
            self._print(value) if condition == sympy.true else f"{self._print(value)} where {self._print(condition)}"
            for value, condition in expr.args
        ]
        return f"({', else '.join(parts)})"

    def _print_BooleanTrue(self, expr: Any) -> str:
        return "true"

    def _print_BooleanFalse(self, expr: Any) -> str:
        return "false"


def plain(expr: Any) -> str:
    """The expression in plain maths."""
    found = sympy.sympify(expr)
    for floor in found.atoms(sympy.floor):
        value, by = sympy.fraction(sympy.together(floor.args[0]))
        if by != 1:  # x - 4*(x//4), as cutting an axis in two leaves it
            found = found.subs(sympy.expand(value - by * floor), sympy.Mod(value, by))
    return str(_Printer().doprint(_shorter(found)))


def _shorter(expr: Any) -> Any:
    """A truth value with comparisons as atoms, simplified; as it is where that is no shorter."""
    if not isinstance(expr, (sympy.And, sympy.Or)):
        return expr
    names: dict[Any, Any] = {}
    for relation in sorted(expr.atoms(sympy.core.relational.Relational), key=sympy.default_sort_key):
        opposite = names.get(relation.negated)
        names[relation] = sympy.Dummy() if opposite is None else sympy.Not(opposite)
    back = {name: relation for relation, name in names.items() if name.is_Symbol}
    if len(back) > _MOST_ATOMS:
        return expr
    found = sympy.simplify_logic(expr.xreplace(names), form="dnf", force=True).xreplace(back)
    return found if found.count_ops() < expr.count_ops() else expr
