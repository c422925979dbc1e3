"""Expressions as text: one line of Python becomes device text and an eager torch form, so that the two agree.

The language: + - * / // %, comparisons (chained too), and, or, not, `a if c else b`, abs, min, max, exp, log,
sqrt, tanh, sigmoid; names that the caller puts in scope; tensor[index] with an index that the tensor has.
Integers stay integers, / gives a float, // and % round down.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

_UNARY = ("exp", "log", "sqrt", "tanh", "sigmoid")
_Operators = dict[type[ast.AST], tuple[str, Callable[[Any, Any], Any]]]  # C++, eager
_ARITHMETIC: _Operators = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
}
_ROUNDING: _Operators = {
    ast.FloorDiv: ("floor_quotient", operator.floordiv),
    ast.Mod: ("floor_remainder", operator.mod),
}
_COMPARISONS: _Operators = {
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
}


@dataclass(frozen=True)
class Name:
    """kind: "int", "float" or "bool"; of a tensor, its elements'. text: in C++."""

    kind: str
    text: str
    indices: tuple[str, ...] = ()  # the names this tensor is indexed with
    per_key: bool = False  # a row for each request, an element for each of its keys


@dataclass(frozen=True)
class Part:
    kind: str  # as of a Name
    text: str
    eager: Callable[[Mapping[str, Any]], Any]


def translate(
    source: str, scope: Mapping[str, Name], where: str, per_key: frozenset[str] = frozenset()
) -> tuple[Part, list[str]]:
    """A part, and with per_key the texts of its pieces that name nothing of per_key, which the part calls
    row0, row1, ... Raises ValueError, with `where` and the part of the text that does not fit.
    """
    try:
        tree = ast.parse(source.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{where}: expected an expression, got {source!r}: {error.msg}") from None
    translator = _Translator(source.strip(), scope, where, per_key)
    return translator.part(tree), translator.of_row


def names_in(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


class _Translator:
    def __init__(self, source: str, scope: Mapping[str, Name], where: str, per_key: frozenset[str]) -> None:
        self.source, self.scope, self.where, self.per_key = source, scope, where, per_key
        self.of_row: list[str] = []

    def fail(self, node: ast.AST, wanted: str) -> NoReturn:
        raise ValueError(
            f"{self.where}: expected {wanted}, got {ast.get_source_segment(self.source, node)!r}"
        )

    def part(self, node: ast.expr) -> Part:
        if not self.per_key or not names_in(node) or names_in(node) & self.per_key:
            return self.piece(node)
        whole = _Translator(self.source, self.scope, self.where, frozenset()).piece(node)
        return replace(whole, text=self.row_text(whole.text))

    def row_text(self, text: str) -> str:
        if text not in self.of_row:
            self.of_row.append(text)
        return f"row{self.of_row.index(text)}"

    def piece(self, node: ast.expr) -> Part:
        match node:
            case ast.Constant(value=value):
                return self.constant(node, value)
            case ast.Name(id=name):
                return self.name(node, name)
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Name(id=index)):
                return self.element(node, name, index)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                of = self.number(operand)
                return Part(of.kind, f"(-{of.text})", lambda s: -of.eager(s))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                of = self.truth(operand)
                return Part("bool", f"(!{of.text})", lambda s: ~_bool(of.eager(s)))
            case ast.BinOp():
                return self.binary(node)
            case ast.Compare():
                return self.comparison(node)
            case ast.BoolOp(op=op, values=values):
                return self.all_of([self.truth(v) for v in values], isinstance(op, ast.And))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                c, (a, b) = self.truth(test), self.alike(node, self.part(body), self.part(orelse))
                return Part(
                    a.kind,
                    f"({c.text} ? {a.text} : {b.text})",
                    lambda s: torch.where(_bool(c.eager(s)), _tensor(a.eager(s)), _tensor(b.eager(s))),
                )
            case ast.Call(func=ast.Name(id=function), args=args, keywords=[]):
                return self.call(node, function, args)
        return self.fail(
            node, "a number, a name, arithmetic, a comparison, and, or, not, if-else or a known function"
        )

    def constant(self, node: ast.expr, value: object) -> Part:
        if isinstance(value, bool):
            return Part("bool", str(value).lower(), lambda s: value)
        if isinstance(value, int) and abs(value) < 1 << 31:
            return Part("int", str(value), lambda s: value)
        if isinstance(value, float) and math.isfinite(value):
            return Part("float", f"{value!r}f", lambda s: value)
        return self.fail(node, "a finite number (integers of 32 bits)")

    def name(self, node: ast.expr, name: str) -> Part:
        found = self.scope.get(name)
        if found is None:
            self.fail(node, f"one of {', '.join(self.scope)}")
        if found.indices:
            self.fail(node, " or ".join(f"{name}[{i}]" for i in found.indices))
        return Part(found.kind, found.text, lambda s: s[name])

    def element(self, node: ast.expr, name: str, index: str) -> Part:
        found, place = self.scope.get(name), self.scope.get(index)
        if found is None or not found.indices:
            self.fail(node, "a tensor argument before [")
        if index not in found.indices or place is None:
            known = " or ".join(f"{name}[{i}]" for i in found.indices if i in self.scope)
            self.fail(node, known or f"no {name} here")

        def eager(s: Mapping[str, Any]) -> Any:
            if found.per_key:  # of a request without keys, nobody asks for the result
                x = s[name][s["request"]][s[index].clamp(max=s["kv_len"] - 1).clamp(min=0)]
            else:
                x = s[name][s[index]]
            return x.long() if found.kind == "int" else x  # bytes would overflow

        text = self.row_text(found.text) if found.per_key and self.per_key else found.text
        return Part(found.kind, f"{text}[{place.text}]", eager)

    def number(self, node: ast.expr) -> Part:
        found = self.part(node)
        return found if found.kind != "bool" else self.fail(node, "a number")

    def truth(self, node: ast.expr) -> Part:
        found = self.part(node)
        return found if found.kind == "bool" else self.fail(node, "a condition")

    def alike(self, node: ast.AST, a: Part, b: Part) -> tuple[Part, Part]:
        if a.kind == b.kind:
            return a, b
        if "bool" in (a.kind, b.kind):
            self.fail(node, "two numbers or two conditions")
        return _as_float(a), _as_float(b)

    def binary(self, node: ast.BinOp) -> Part:
        if isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            return self.all_of(
                [self.truth(node.left), self.truth(node.right)], isinstance(node.op, ast.BitAnd)
            )
        a, b = self.number(node.left), self.number(node.right)
        if isinstance(node.op, ast.Div):
            a, b = _as_float(a), _as_float(b)
            return Part("float", f"expression::quotient({a.text}, {b.text})", _eager(operator.truediv, a, b))
        if rounding := _ROUNDING.get(type(node.op)):
            if (a.kind, b.kind) != ("int", "int"):
                self.fail(node, "integers around // and %")
            function, apply = rounding
            return Part("int", f"expression::{function}({a.text}, {b.text})", _eager(apply, a, b))
        symbol, apply = _ARITHMETIC.get(type(node.op)) or self.fail(node, "+ - * / // or %")
        a, b = self.alike(node, a, b)
        return Part(a.kind, f"({a.text} {symbol} {b.text})", _eager(apply, a, b))

    def comparison(self, node: ast.Compare) -> Part:
        sides = [self.number(x) for x in (node.left, *node.comparators)]
        parts = []
        for op, left, right in zip(node.ops, sides, sides[1:], strict=False):
            symbol, apply = _COMPARISONS.get(type(op)) or self.fail(node, "one of < <= > >= == !=")
            a, b = self.alike(node, left, right)
            parts.append(Part("bool", f"({a.text} {symbol} {b.text})", _eager(apply, a, b)))
        return self.all_of(parts, True)

    def all_of(self, parts: list[Part], every: bool) -> Part:
        def eager(scope: Mapping[str, Any]) -> Any:
            result = _bool(parts[0].eager(scope))
            for part in parts[1:]:
                other = _bool(part.eager(scope))
                result = result & other if every else result | other
            return result

        text = (" && " if every else " || ").join(part.text for part in parts)
        return Part("bool", f"({text})", eager)

    def call(self, node: ast.Call, function: str, args: list[ast.expr]) -> Part:
        if function in ("min", "max") and len(args) == 2:
            a, b = self.alike(node, self.number(args[0]), self.number(args[1]))
            sign, first = ("<", operator.lt) if function == "min" else (">", operator.gt)
            # not torch.minimum: where takes a number beside a tensor on the GPU
            pick = _eager(lambda x, y: torch.where(first(x, y), x, y), a, b)
            text = f"({a.text} {sign} {b.text} ? {a.text} : {b.text})"
            return Part(a.kind, text, pick)
        if function == "abs" and len(args) == 1:
            a = self.number(args[0])
            return Part(a.kind, f"({a.text} < 0 ? -{a.text} : {a.text})", lambda s: abs(a.eager(s)))
        if function in _UNARY and len(args) == 1:
            a = _as_float(self.number(args[0]))
            apply = getattr(torch, function)
            return Part("float", f"expression::{function}({a.text})", lambda s: apply(_tensor(a.eager(s))))
        return self.fail(node, f"abs, {', '.join(_UNARY)} of one number, or min, max of two")


def _as_float(part: Part) -> Part:
    if part.kind == "float":
        return part
    text = f"expression::number({part.text})"
    return Part("float", text, lambda s: _tensor(part.eager(s)).to(torch.float64))


def _eager(apply: Callable[[Any, Any], Any], a: Part, b: Part) -> Callable[[Mapping[str, Any]], Any]:
    return lambda scope: apply(_tensor(a.eager(scope)), _tensor(b.eager(scope)))


def _tensor(x: Any) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x
    return torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else None)


def _bool(x: Any) -> torch.Tensor:
    return _tensor(x).bool()
