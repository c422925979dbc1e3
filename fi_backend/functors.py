"""Functors from expressions: device text beside its eager torch form; and where a text stands in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .expressions import Name, Part, translate

if TYPE_CHECKING:
    from .variants import Argument


_INDICES = {  # of a tensor argument, by what it is per
    "head": ("q_head",),
    "request": ("request",),
    "token": ("q_token",),
    "key": ("kv_pos", "q_pos"),
    "dim": ("dim",),
}


def functor(
    name: str, args: tuple[Argument, ...], source: object, kind: str
) -> tuple[str, Callable[..., torch.Tensor]]:
    """Text and eager form of variants.define(name, *args, kind=source)."""
    sources = source if kind == "keys" and isinstance(source, tuple) else (source,)
    if not all(isinstance(x, str) for x in sources) or len(sources) != (2 if kind == "keys" else 1):
        wanted = "two expressions" if kind == "keys" else "an expression"
        raise ValueError(f"variant {name}: expected {wanted} where there is no text, got {source!r}")
    of_keys, of_queries = kind in ("key", "value"), kind in ("query", "output")
    row = "k" if of_keys else "r"
    names = ("kv_pos", "kv_head") if of_keys else ("q_pos", "q_token", "q_len")
    scope = {n: Name("int", f"{row}.{n}") for n in (*names, "kv_len", "request")}
    if kind in ("mask", "logits", "weights"):
        scope |= {"kv_pos": Name("int", "kv_pos")}
    if kind in ("logits", "weights") or of_queries:
        scope |= {"q_head": Name("int", "r.q_head")}
    if kind not in ("mask", "keys"):
        scope |= {"x": Name("float", "x[d]" if kind in ("query", "key", "value") else "x")}
    if of_keys or of_queries:
        scope |= {"dim": Name("int", "int32_t(d)")}
    for arg in args:
        if arg.name in scope or not arg.name.isidentifier():
            raise ValueError(f"variant {name}: expected another name for argument {arg.name!r}")
        if arg.kind != "tensor":
            scope[arg.name] = Name(arg.kind, f"a.{arg.name}")
        elif arg.per in _INDICES:
            element = {torch.float32: "float", torch.bool: "bool"}.get(arg.dtype, "int")
            text = f"a.{arg.name}[{row}]" if arg.per_key else f"a.{arg.name}"
            scope[arg.name] = Name(element, text, _INDICES[arg.per], arg.per_key)
        else:
            raise ValueError(
                f"variant {name}: expected {arg.name} per {', '.join(_INDICES)}, got per {arg.per}"
            )
    per_key = frozenset(("x", "kv_pos")) if kind in ("logits", "weights") else frozenset()
    (part, of_row), *others = (translate(x, scope, f"variant {name}", per_key) for x in sources)
    if kind == "keys":
        end = others[0][0]
        if (part.kind, end.kind) != ("int", "int"):
            raise ValueError(f"variant {name}: expected keys to be integers, got {source!r}")
        return _KEYS.format(part.text, end.text), _eager_keys(name, part, end)
    if kind == "mask":
        if part.kind != "bool":
            raise ValueError(f"variant {name}: expected mask to be a condition, got {source!r}")
        return _MASK.format(part.text), _eager_mask(part)
    if part.kind == "bool":
        raise ValueError(f"variant {name}: expected {kind} to be a number, got {source!r}")
    if of_keys or of_queries:
        return _TRANSFORMS[kind].format(kind, part.text), _eager_transform(part, "kv" if of_keys else "q")
    rows = "".join(f"  const auto row{i} = {text};\n" for i, text in enumerate(of_row))
    return _NUMBER.format(kind, rows, part.text), _eager_number(part)


_MASK = """template <class A>
struct Mask {{
  const A& a;
  Row r;
  FI_HD bool sees(int32_t kv_pos) const {{ return {}; }}
}};
template <class A>
FI_HD static Mask<A> mask(const A& a, const Row& r) {{ return {{a, r}}; }}
template <class A>
FI_HD static int32_t seen_before(const A&, const Row&) {{ return 0; }}"""
_KEYS = """template <class A>
FI_HD static KeyRange keys(const A& a, const Row& r) {{ return {{int32_t({}), int32_t({})}}; }}"""
_NUMBER = """template <class A>
FI_HD static auto {}(const A& a, const Row& r) {{
{}  return [=](auto x, Position kv_pos) -> float {{ return {}; }};
}}"""

_VECTOR = """template <class A, class X>
FI_HD static auto {{}}(const A& a, X x, const {}) {{{{
  return mapped(x, [=, &a](Dim d) -> float {{{{ return {{}}; }}}});
}}}}"""
_TRANSFORMS = {
    "query": _VECTOR.format("Row& r"),
    "key": _VECTOR.format("Key& k"),
    "value": _VECTOR.format("Key& k"),
    "output": """template <class A>
FI_HD static float {}(const A& a, float x, const Row& r, int32_t d) {{ return {}; }}""",
}


def _tokens(q_pos: torch.Tensor, args: Mapping[str, Any]) -> torch.Tensor:
    return torch.arange(len(q_pos), device=q_pos.device) + args["q_first"]


def _eager_mask(part: Part) -> Callable[..., torch.Tensor]:
    def mask(q_pos: torch.Tensor, kv_pos: torch.Tensor, **args: Any) -> torch.Tensor:
        names = {"q_pos": q_pos[:, None], "kv_pos": kv_pos[None, :], "q_token": _tokens(q_pos, args)[:, None]}
        found = torch.as_tensor(part.eager(args | names))
        return found.to(q_pos.device).expand(len(q_pos), len(kv_pos))

    return mask


def _eager_keys(name: str, begin: Part, end: Part) -> Callable[..., torch.Tensor]:
    def mask(q_pos: torch.Tensor, kv_pos: torch.Tensor, **args: Any) -> torch.Tensor:
        bounds = []
        for part in (begin, end):
            names = {"q_pos": q_pos, "q_token": _tokens(q_pos, args)}
            found = torch.as_tensor(part.eager(args | names), device=q_pos.device)
            bounds.append(found.expand(len(q_pos)))
            if not q_pos.is_meta and (bounds[-1].diff() < 0).any():
                raise ValueError(
                    f"variant {name}: expected keys that do not go down as q_pos goes up, "
                    f"got {bounds[-1].tolist()}"
                )
        return (bounds[0][:, None] <= kv_pos) & (kv_pos < bounds[1][:, None])

    return mask


def _eager_number(part: Part) -> Callable[..., torch.Tensor]:
    def number(x: torch.Tensor, q_pos: torch.Tensor, kv_pos: torch.Tensor, **args: Any) -> torch.Tensor:
        heads = torch.arange(len(x), device=x.device)[:, None, None]
        names = {"x": x, "q_pos": q_pos[None, :, None], "kv_pos": kv_pos[None, None, :], "q_head": heads}
        names["q_token"] = _tokens(q_pos, args)[None, :, None]
        found = torch.as_tensor(part.eager(args | names), device=x.device)
        return found.to(x.dtype).expand(x.shape)

    return number


def _eager_transform(part: Part, side: str) -> Callable[..., torch.Tensor]:
    def transform(x: torch.Tensor, positions: torch.Tensor, **args: Any) -> torch.Tensor:
        names = {"x": x, f"{side}_pos": positions[None, :, None]}
        names[f"{side}_head"] = torch.arange(len(x), device=x.device)[:, None, None]
        names["dim"] = torch.arange(x.shape[2], device=x.device)
        if side == "q":
            names["q_token"] = _tokens(positions, args)[None, :, None]
        return torch.as_tensor(part.eager(args | names), device=x.device).to(x.dtype).expand(x.shape)

    return transform


def place_of(text: str, file: str, line: int) -> tuple[str, int]:
    """File and line of the first line of text, which a call that begins at that line was given."""
    first = next((t for t in text.splitlines() if t.strip()), "")
    before = text[: text.index(first)].count("\n")
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return file, line
    found = next((n for n, t in enumerate(lines[line - 1 :], line) if first and first in t), line)
    return file, found - before
