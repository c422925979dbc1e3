"""What attention computes: features, composed into variants with `+`.

A feature names its C++ functor (csrc/variant.h), its run-time arguments and the same arithmetic in eager
torch, which only the oracle uses. All logits are in natural units, already scaled.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import torch

from . import arrays
from .functors import functor, place_of

_FORMATS = {"float": "f4x", "int": "i4x", "tensor": "Q"}  # every argument fills one 8-byte slot
MAX_ARGS = 8  # kMaxVariantBytes / 8 in csrc/params.h
MAX_KV_LEN = 1 << 30  # kMaxKvLen in csrc/schedule.h; a longer window would overflow int32 positions


@dataclass(frozen=True)
class Argument:
    """kind: "float", "int", or "tensor" (of one dimension, contiguous, on the device of q).

    A tensor has dtype float32, int32 or int64 and, per "head", q_heads elements; per "request", at least as
    many as the batch has requests; per "token", as many as the feature says (`run` checks both).
    """

    name: str
    kind: str
    at_least: float | None = None
    at_most: float | None = None
    dtype: torch.dtype = torch.float32
    per: str = "head"


@dataclass(frozen=True, eq=False)
class Feature:
    """Eager forms take q_pos [Tq] and kv_pos [Tk] (int64) of one request, and by name the arguments, the
    request's index in the batch (request) and its number of keys (kv_len).

    mask -> bool [Tq, Tk], True: visible; logits(x [Hq, Tq, Tk]) -> same shape; weights(x [Hq, Tq, Tk]), in
    place of softmax -> same shape; sink -> [Hq].

    text: the struct of a functor that is not in csrc; place: file and line where its inside was written;
    definition: arguments of `define`, for other processes.
    """

    name: str
    functor: str
    args: tuple[Argument, ...] = ()
    mask: Callable[..., torch.Tensor] | None = None
    logits: Callable[..., torch.Tensor] | None = None
    sink: Callable[..., torch.Tensor] | None = None
    weights: Callable[..., torch.Tensor] | None = None
    text: str = ""
    place: tuple[str, int] = ("", 0)
    definition: tuple[str, tuple[Argument, ...], dict[str, Any]] | None = None

    def _rank(self) -> tuple[int, str]:
        # masks commute, so they get one order and `WINDOW + CAUSAL` is the same build as `CAUSAL + WINDOW`;
        # logits transforms keep the order they were written in
        if self.mask is not None:
            return (0, self.name)
        return (1, "") if self.logits is not None else (2, self.name)


class Variant:
    """A composition of features. Equal compositions are one object, so identity is equality."""

    features: tuple[Feature, ...]
    args: tuple[Argument, ...]
    name: str
    per_request: tuple[str, ...]  # arguments
    softmax: bool  # False: a feature says what a key weighs, and there is no LSE
    _names: set[str]
    _struct: struct.Struct
    _interned: ClassVar[dict[tuple[str, ...], Variant]] = {}

    def __new__(cls, *features: Feature) -> Variant:
        ordered = tuple(sorted(dict.fromkeys(features), key=Feature._rank))
        key = tuple(f.name for f in ordered)
        if found := cls._interned.get(key):
            return found
        args = tuple(a for f in ordered for a in f.args)
        if len({a.name for a in args}) != len(args):
            raise ValueError(f"variant {'+'.join(key)}: two features share an argument name")
        if len(args) > MAX_ARGS:
            raise ValueError(
                f"variant {'+'.join(key)}: expected at most {MAX_ARGS} arguments, got {len(args)}"
            )
        sinks, weights = (sum(getattr(f, x) is not None for f in ordered) for x in ("sink", "weights"))
        if sinks + weights > 1:
            raise ValueError(
                f"variant {'+'.join(key)}: expected at most one sink or function of weights, "
                f"got {sinks} and {weights}"
            )
        self = super().__new__(cls)
        self.features = ordered
        self.args = args
        self.name = "+".join(key) or "FULL"
        self.softmax = weights == 0
        self.per_request = tuple(a.name for a in args if a.per == "request")
        self._names = {a.name for a in args}
        self._struct = struct.Struct("<" + "".join(_FORMATS[a.kind] for a in args))
        return cls._interned.setdefault(key, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _define_and_parse, (self.name, [f.definition for f in self.features if f.definition])

    def __repr__(self) -> str:
        return self.name

    def __add__(self, other: Variant) -> Variant:
        if not isinstance(other, Variant):
            return NotImplemented
        return Variant(*self.features, *other.features)

    def __contains__(self, other: Variant) -> bool:
        return set(other.features) <= set(self.features)

    def pack(self, values: Mapping[str, Any], q_heads: int, device: torch.device) -> bytes:
        """The bytes of the generated struct Args. Raises ValueError for arguments that do not fit."""
        if not self.args and not values:
            return b""
        if values.keys() != self._names:
            self._complain(values)
        return self._struct.pack(*[_slot(self, a, values[a.name], q_heads, device) for a in self.args])

    def _complain(self, values: Mapping[str, Any]) -> None:
        wanted = {a.name: a.kind for a in self.args}
        for name in values:
            if name not in wanted:
                takes = ", ".join(wanted) or "no arguments"
                raise ValueError(f"variant {self.name} takes {takes}, got unknown argument {name}")
        for name, kind in wanted.items():
            if name not in values:
                raise ValueError(f"variant {self.name} needs argument {name} ({kind}), got none")


def _slot(variant: Variant, arg: Argument, value: Any, q_heads: int, device: torch.device) -> Any:
    if arg.kind == "tensor":
        if not isinstance(value, torch.Tensor):  # over memory that the caller holds
            value = arrays.tensor(f"variant {variant.name}: expected {arg.name}", value)
        fits = value.shape == (q_heads,) if arg.per == "head" else value.dim() == 1
        if not fits or value.dtype != arg.dtype or not value.is_contiguous():
            length = f"[{q_heads}] (q heads)" if arg.per == "head" else f"[{arg.per}s]"
            raise ValueError(
                f"variant {variant.name}: expected {arg.name} contiguous {str(arg.dtype)[6:]} {length}, "
                f"got {value.dtype} {list(value.shape)} with strides {list(value.stride())}"
            )
        if value.device != device:
            raise ValueError(f"variant {variant.name}: expected {arg.name} on {device}, got {value.device}")
        return value.data_ptr()
    try:
        number = int(value) if arg.kind == "int" else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or number != value:
        kind = "an int" if arg.kind == "int" else "a float"
        raise ValueError(f"variant {variant.name}: expected {arg.name} to be {kind}, got {value!r}")
    if arg.at_least is not None and not number >= arg.at_least:
        raise ValueError(f"variant {variant.name}: expected {arg.name} >= {arg.at_least:g}, got {value!r}")
    if arg.at_most is not None and not number <= arg.at_most:
        raise ValueError(f"variant {variant.name}: expected {arg.name} <= {arg.at_most}, got {value!r}")
    return number


def check_requests(variant: Variant, args: Mapping[str, Any], requests: int) -> None:
    """Raises ValueError if tensors that pack() took have too few elements for a batch."""
    if "tree_tokens" in args:
        needed = requests * args["tree_tokens"]
        if (found := args["tree_mask"].shape[0]) < needed:
            raise ValueError(
                f"expected tree_mask of at least {needed} words ({requests} requests x "
                f"tree_tokens {args['tree_tokens']}), got {found}"
            )
    for name in variant.per_request:
        if (found := args[name].shape[0]) < requests:
            raise ValueError(f"expected {name} of at least {requests} requests (the batch's), got {found}")


def _tree_mask(
    q_pos: torch.Tensor,
    kv_pos: torch.Tensor,
    *,
    request: int,
    kv_len: int,
    tree_mask: torch.Tensor,
    tree_tokens: int,
    **_: Any,
) -> torch.Tensor:
    first = kv_len - tree_tokens
    token, j = q_pos - first, kv_pos - first
    words = tree_mask[request * tree_tokens + token.clamp(min=0)]
    return (token < 0)[:, None] | (j < 0) | (words[:, None] >> j.clamp(min=0) & 1).bool()


FULL = Variant()
CAUSAL = Variant(
    Feature("CAUSAL", "fi::Causal", mask=lambda q_pos, kv_pos, **_: kv_pos[None, :] <= q_pos[:, None])
)
WINDOW = Variant(
    Feature(
        "WINDOW",
        "fi::Window",
        (Argument("window", "int", at_least=1, at_most=MAX_KV_LEN),),
        mask=lambda q_pos, kv_pos, *, window, **_: kv_pos[None, :] > q_pos[:, None] - window,
    )
)
SOFT_CAP = Variant(
    Feature(
        "SOFT_CAP",
        "fi::SoftCap",
        # at most: the error of capped() on a GPU grows with the cap
        (Argument("soft_cap", "float", at_least=1e-6, at_most=1000),),
        logits=lambda x, q_pos, kv_pos, *, soft_cap, **_: soft_cap * torch.tanh(x / soft_cap),
    )
)
ALIBI = Variant(
    Feature(
        "ALIBI",
        "fi::Alibi",
        (Argument("alibi_slopes", "tensor"),),
        logits=lambda x, q_pos, kv_pos, *, alibi_slopes, **_: (
            x + alibi_slopes[:, None, None].to(x.dtype) * (kv_pos[None, :] - q_pos[:, None]).to(x.dtype)
        ),
    )
)
SINKS = Variant(
    Feature("SINKS", "fi::Sinks", (Argument("sinks", "tensor"),), sink=lambda *, sinks, **_: sinks)
)
# In place of softmax (FlashSigmoid): weights do not sum up to 1, and there is no LSE. sigmoid_bias is about
# -log of the number of keys.
SIGMOID = Variant(
    Feature(
        "SIGMOID",
        "fi::Sigmoid",
        (Argument("sigmoid_bias", "float"),),
        weights=lambda x, q_pos, kv_pos, *, sigmoid_bias, **_: torch.sigmoid(x + sigmoid_bias),
    )
)
# Speculative token trees: the last tree_tokens keys of a request are its tree, with a word each in tree_mask
# [requests * tree_tokens]: bit j of a query token's word says that it sees the j-th of them. Keys before the
# tree are visible to all, and query tokens before it see everything. With CAUSAL, where a parent comes before
# its children. A window counts keys as they lie in the cache, not along the tree.
TREE = Variant(
    Feature(
        "TREE",
        "fi::Tree",
        (
            Argument("tree_mask", "tensor", dtype=torch.int64, per="token"),
            Argument("tree_tokens", "int", at_least=1, at_most=64),  # the bits of a word
        ),
        mask=_tree_mask,
    )
)

BUILT_IN = {v.name: v for v in (FULL, CAUSAL, WINDOW, SOFT_CAP, ALIBI, SINKS, SIGMOID, TREE)}


_defined: dict[str, Variant] = {}
_CONSTANTS = {  # of a defined functor
    "mask": "",
    "keys": "",
    "logits": "static constexpr bool kHasLogits = true;\n",
    "weights": "static constexpr bool kSoftmax = false;\n",
}


def parse(name: str) -> Variant:
    """ "CAUSAL+WINDOW" -> CAUSAL + WINDOW. Raises ValueError for a name that nobody defined."""
    result, known = FULL, BUILT_IN | _defined
    for part in name.upper().split("+"):
        if part.strip() not in known:
            raise ValueError(f"expected a variant made of {', '.join(known)} joined by +, got {name!r}")
        result += known[part.strip()]
    return result


def define(
    name: str,
    *args: Argument,
    mask: str | Callable[..., torch.Tensor] | None = None,
    keys: tuple[str, str] | None = None,
    logits: str | Callable[..., torch.Tensor] | None = None,
    weights: str | Callable[..., torch.Tensor] | None = None,
    text: str | None = None,
) -> Variant:
    """A variant of one's own, used and composed like those that are built in. Examples: docs/variants.md.

    name: capitals, digits, _. Exactly one of
    mask: a condition that says which keys a query token sees;
    keys: the first key that a query token sees and the one after the last; neither goes down as q_pos goes
    up. Tiles outside are not loaded;
    logits: what becomes of the logit x (natural units, already scaled);
    weights: what a key of logit x weighs, in place of softmax.
    All may use q_pos and, but in keys, kv_pos (positions among the request's keys), kv_len, request (index in
    the batch), arguments by name, tensor arguments as name[request]; logits and weights also q_head and
    name[q_head]. fi_backend/expressions.py has the language.

    text: instead of an expression, the inside of a C++ struct that inherits fi::Feature (csrc/variant.h),
    with the function of that name; the keyword is then its eager torch form, with Feature's signature; for
    text with keys() that is mask. Text with a mask() overrides seen_before() as well: the first key that may
    be hidden.

    Raises ValueError for a name that is taken by something else, and for what is not in the language.
    """
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name) or name in BUILT_IN:
        raise ValueError(f"expected a name of capitals, digits and _ that is not built in, got {name!r}")
    forms = {"mask": mask, "keys": keys, "logits": logits, "weights": weights}
    given = {kind: form for kind, form in forms.items() if form is not None}
    if len(given) != 1:
        raise ValueError(
            f"variant {name}: expected one of {', '.join(forms)}, got {' and '.join(given) or 'none'}"
        )
    [(kind, form)], place = given.items(), ("", 0)
    if text is None:
        text, eager = functor(name, args, form, kind)
    elif callable(form) and kind != "keys":
        caller = sys._getframe(1)
        eager, place = form, place_of(text, caller.f_code.co_filename, caller.f_lineno)
    else:
        raise ValueError(
            f"variant {name}: expected mask, logits or weights in torch beside text, got {kind}={form!r}"
        )
    body = f'struct {name} : Feature {{\n{_CONSTANTS[kind]}#line 1 "{name}"\n{text}\n}};\n'
    definition = name, args, {kind: form} if not callable(form) else {kind: form, "text": text}
    feature = Feature(
        name,
        f"fi::user::{name}",
        args,
        text=body,
        place=place,
        definition=definition,
        **{"mask" if kind == "keys" else kind: eager},
    )
    if taken := _defined.get(name):
        old = taken.features[0]
        if (old.text, old.args) != (feature.text, feature.args):
            raise ValueError(f"variant {name}: expected a new name, got one that is defined otherwise")
        return taken
    return _defined.setdefault(name, Variant(feature))


def _define_and_parse(
    name: str, definitions: list[tuple[str, tuple[Argument, ...], dict[str, Any]]]
) -> Variant:
    for own, args, forms in definitions:
        define(own, *args, **forms)
    return parse(name)


def compose(*, causal: bool, window: bool, soft_cap: bool, alibi: bool, sinks: bool) -> Variant:
    """The variant of a layer, in the one order adapters and `jit warmup` agree on."""
    wanted = ((CAUSAL, causal), (WINDOW, window), (SOFT_CAP, soft_cap), (ALIBI, alibi), (SINKS, sinks))
    return reduce(Variant.__add__, (v for v, on in wanted if on), FULL)


def with_places(message: str) -> str:
    """A compiler's message; lines of defined functors, NAME:3, become those of the file they stand in."""
    for variant in _defined.values():
        feature = variant.features[0]
        file, first = feature.place
        if file:
            parts = re.split(rf"(?<![\w.]){feature.name}([:(])(\d+)", message)  # text, sign, line, text, ...
            places = [
                f"{file}{sign}{first + int(line) - 1}"
                for sign, line in zip(parts[1::3], parts[2::3], strict=True)
            ]
            message = "".join(map("".join, zip(parts[::3], [*places, ""], strict=True)))
    return message
