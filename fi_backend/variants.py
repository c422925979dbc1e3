"""What attention computes: features, composed into variants with `+`.

A feature names its C++ functor (csrc/variant.h), its run-time arguments and the same arithmetic in eager
torch, which only the oracle uses. All logits are in natural units, already scaled.
"""

from __future__ import annotations

import functools
import re
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from . import arrays
from .functors import functor, place_of
from .rope import rotated

_FORMATS = {"float": "f4x", "int": "i4x", "tensor": "Q"}  # every argument fills one 8-byte slot
_PER_KEY_FORMAT = "Qq"  # but a tensor per key two: the length of its rows
MAX_SLOTS = 8  # kMaxVariantBytes / 8 in csrc/params.h
ELEMENTS = {  # of tensors, in C++
    torch.float32: "float",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.uint8: "uint8_t",
    torch.bool: "bool",
}
_SHAPES = {
    "head": "[q heads]",
    "request": "[requests]",
    "token": "[tokens]",
    "key": "[requests, positions]",
    "dim": "[head_dim]",
    "pair": "[head_dim / 2]",
    "word": "[words]",
}
MAX_KV_LEN = 1 << 30  # kMaxKvLen in csrc/schedule.h; a longer window would overflow int32 positions


@dataclass(frozen=True)
class Argument:
    """kind: "float", "int", or "tensor" (contiguous, on the device of q).

    A tensor has dtype float32, int32, int64, uint8 or bool and, by what it is per, the shape
    "head": [q_heads];
    "request": [requests], of the batch or more;
    "token": [tokens], of q or more: an element for each query token;
    "key": [requests, positions], of the batch and of its longest request or more: an element for each of a
    request's keys, of which those past kv_len are not read;
    "dim": [head_dim], or `elements` if that is given; "pair": [head_dim / 2], or `elements`;
    "word": [words], as many as the feature says.
    `run` checks the shape; whether there are enough positions on the CPU and, with FI_DEBUG=1, on a GPU.

    Raises ValueError for a kind, a dtype or a per that does not exist.
    """

    name: str
    kind: str
    at_least: float | None = None
    at_most: float | None = None
    dtype: torch.dtype = torch.float32
    per: str = "head"
    elements: int | None = None

    def __post_init__(self) -> None:
        for what, found, known in (
            ("kind", self.kind, _FORMATS),
            ("dtype", self.dtype, ELEMENTS),
            ("per", self.per, _SHAPES),
        ):
            if found not in known:
                wanted = ", ".join(map(str, known))
                raise ValueError(f"argument {self.name}: expected {what} to be one of {wanted}, got {found}")

    @property
    def per_key(self) -> bool:
        return self.kind == "tensor" and self.per == "key"

    @property
    def format(self) -> str:
        """Of its bytes among the arguments."""
        return _PER_KEY_FORMAT if self.per_key else _FORMATS[self.kind]


@dataclass(frozen=True, eq=False)
class Feature:
    """Eager forms take q_pos [Tq] and kv_pos [Tk] (int64) of one request, and by name the arguments, the
    request's index in the batch (request), its numbers of query tokens (q_len) and keys (kv_len), and the
    index of its first query token in q (q_first).

    mask -> bool [Tq, Tk], True: visible; logits(x [Hq, Tq, Tk]) -> same shape; weights(x [Hq, Tq, Tk]), in
    place of softmax -> same shape; sink -> [Hq]. With q_pos alone query(x [Hq, Tq, D]) and
    output(x [Hq, Tq, Dv]), with kv_pos alone key(x [Hk, Tk, D]) and value(x [Hk, Tk, Dv]) -> same shape.

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
    query: Callable[..., torch.Tensor] | None = None
    key: Callable[..., torch.Tensor] | None = None
    value: Callable[..., torch.Tensor] | None = None
    output: Callable[..., torch.Tensor] | None = None
    text: str = ""
    place: tuple[str, int] = ("", 0)
    definition: tuple[str, tuple[Argument, ...], dict[str, Any]] | None = None

    def _rank(self) -> tuple[int, str]:
        # masks commute, so they get one order and `WINDOW + CAUSAL` is the same build as `CAUSAL + WINDOW`;
        # transforms keep the order they were written in
        if self.mask is not None:
            return (0, self.name)
        transforms = (self.logits, self.query, self.key, self.value, self.output)
        return (2, self.name) if transforms == (None,) * 5 else (1, "")


class Variant:
    """A composition of features. Equal compositions are one object, so identity is equality."""

    features: tuple[Feature, ...]
    args: tuple[Argument, ...]
    name: str
    tensors: tuple[str, ...]  # arguments
    per_request: tuple[str, ...]  # those per key among them
    per_token: tuple[str, ...]
    per_key: tuple[str, ...]
    per_dim: tuple[Argument, ...]  # or per pair
    softmax: bool  # False: a feature says what a key weighs, and there is no LSE
    rounds: bool  # queries or keys again, after a transform: the LSE is then as exact as their dtype
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
        if (slots := len(args) + sum(a.per_key for a in args)) > MAX_SLOTS:
            raise ValueError(
                f"variant {'+'.join(key)}: expected at most {MAX_SLOTS} arguments, a tensor per key counting "
                f"twice, got {slots}"
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
        self.rounds = any(f.query is not None or f.key is not None for f in ordered)
        tensors = [a for a in args if a.kind == "tensor"]
        self.tensors = tuple(a.name for a in tensors)
        self.per_request = tuple(a.name for a in tensors if a.per in ("request", "key"))
        self.per_token = tuple(a.name for a in tensors if a.per == "token")
        self.per_key = tuple(a.name for a in tensors if a.per == "key")
        self.per_dim = tuple(a for a in tensors if a.per in ("dim", "pair"))
        self._names = {a.name for a in args}
        self._struct = struct.Struct("<" + "".join(a.format for a in args))
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
        slots = []
        for a in self.args:
            slots.append(_slot(self, a, values[a.name], q_heads, device))
            if a.per_key:
                slots.append(values[a.name].shape[1])
        return self._struct.pack(*slots)

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
        if arg.per == "head":
            fits = value.shape == (q_heads,)
        else:  # without positions there is nothing to read for a request without keys
            fits = value.dim() == 1 if arg.per != "key" else value.dim() == 2 and value.shape[1] > 0
        if not fits or value.dtype != arg.dtype or not value.is_contiguous():
            length = f"[{q_heads}] (q heads)" if arg.per == "head" else _SHAPES[arg.per]
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


def _document_mask(
    q_pos: torch.Tensor, kv_pos: torch.Tensor, *, request: int, document_ids: torch.Tensor, **_: Any
) -> torch.Tensor:
    ids = document_ids[request]
    return ids[q_pos.clamp(min=0)][:, None] == ids[kv_pos][None, :]


def _packed_mask(
    q_pos: torch.Tensor,
    kv_pos: torch.Tensor,
    *,
    request: int,
    q_len: int,
    kv_len: int,
    packed_mask: torch.Tensor,
    mask_indptr: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    bit = (q_pos - kv_len + q_len)[:, None] * kv_len + kv_pos[None, :]
    return (packed_mask[mask_indptr[request].long() + bit // 8] >> bit % 8 & 1).bool()


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
            Argument("tree_mask", "tensor", dtype=torch.int64, per="word"),
            Argument("tree_tokens", "int", at_least=1, at_most=64),  # the bits of a word
        ),
        mask=_tree_mask,
    )
)
# Documents packed into one request: document_ids [requests, positions] names the document of each key, and a
# query token sees the keys of its own. With CAUSAL where documents are.
DOCUMENT = Variant(
    Feature(
        "DOCUMENT",
        "fi::Document",
        (Argument("document_ids", "tensor", dtype=torch.int32, per="key"),),
        mask=_document_mask,
    )
)
# A prefix of prefix_len [requests] keys that all of a request's tokens see, causal after it. Without CAUSAL.
PREFIX_LM = Variant(
    Feature(
        "PREFIX_LM",
        "fi::PrefixLm",
        (Argument("prefix_len", "tensor", dtype=torch.int32, per="request"),),
        mask=lambda q_pos, kv_pos, *, request, prefix_len, **_: (
            (kv_pos[None, :] <= q_pos[:, None]) | (kv_pos[None, :] < prefix_len[request])
        ),
    )
)
# A bit for each pair of query token and key of a request, as FlashInfer packs them: of request r from byte
# mask_indptr[r] of packed_mask on, bit token * kv_len + key, the lowest bit of a byte first. 1: visible.
PACKED_MASK = Variant(
    Feature(
        "PACKED_MASK",
        "fi::PackedMask",
        (
            Argument("packed_mask", "tensor", dtype=torch.uint8, per="word"),
            Argument("mask_indptr", "tensor", dtype=torch.int32, per="request"),
        ),
        mask=_packed_mask,
    )
)


@functools.cache
def rope(rotary_dim: int | None = None, interleaved: bool = False) -> Variant:
    """Rotary position embedding of queries and keys in the kernel, from a cache of keys not rotated yet.

    The first rotary_dim elements of a head, None: all. Pairs are the halves of those (NeoX), or neighbours.
    Its argument rope_turns is int32 [rotary_dim / 2], see `fi_backend.rope`. Names for `parse`: ROPE,
    ROPE_64, ROPE_INTERLEAVED, ROPE_INTERLEAVED_64. Raises ValueError for a rotary_dim
    that is odd or not positive.
    """
    if rotary_dim is not None and (rotary_dim < 2 or rotary_dim % 2):
        raise ValueError(f"expected an even rotary_dim of at least 2, or None, got {rotary_dim}")
    name = "ROPE" + "_INTERLEAVED" * interleaved + (f"_{rotary_dim}" if rotary_dim else "")
    pairs = rotary_dim and rotary_dim // 2

    def query(x: torch.Tensor, q_pos: torch.Tensor, *, rope_turns: torch.Tensor, **_: Any) -> torch.Tensor:
        return rotated(x, q_pos, rope_turns, interleaved)

    def key(x: torch.Tensor, kv_pos: torch.Tensor, *, rope_turns: torch.Tensor, **_: Any) -> torch.Tensor:
        return rotated(x, kv_pos, rope_turns, interleaved)

    argument = Argument("rope_turns", "tensor", dtype=torch.int32, per="pair", elements=pairs)
    functor = f"fi::Rope<{rotary_dim or 0}, {str(interleaved).lower()}>"
    return Variant(Feature(name, functor, (argument,), query=query, key=key))


def _normalised(x: torch.Tensor, weights: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weights.to(x.dtype)


# Queries and keys divided by their root mean square, times a weight for each element (QK norm), from a cache
# of keys that are not normalised yet. Models that rotate do so afterwards: QK_NORM + ROPE.
QK_NORM = Variant(
    Feature(
        "QK_NORM",
        "fi::QkNorm",
        (
            Argument("q_norm", "tensor", per="dim"),
            Argument("k_norm", "tensor", per="dim"),
            Argument("norm_epsilon", "float", at_least=0),
        ),
        query=lambda x, q_pos, *, q_norm, norm_epsilon, **_: _normalised(x, q_norm, norm_epsilon),
        key=lambda x, kv_pos, *, k_norm, norm_epsilon, **_: _normalised(x, k_norm, norm_epsilon),
    )
)

BUILT_IN = {
    v.name: v
    for v in (
        FULL,
        CAUSAL,
        WINDOW,
        SOFT_CAP,
        ALIBI,
        SINKS,
        SIGMOID,
        TREE,
        DOCUMENT,
        PREFIX_LM,
        PACKED_MASK,
        rope(),
        QK_NORM,
    )
}
_ROPE = re.compile(r"ROPE(_INTERLEAVED)?(?:_(\d+))?")


TRANSFORMS = ("query", "key", "value", "output")
_defined: dict[str, Variant] = {}
_CONSTANTS = {  # of a defined functor
    "mask": "",
    "keys": "",
    "logits": "static constexpr bool kHasLogits = true;\n",
    "weights": "static constexpr bool kSoftmax = false;\n",
    **{x: f"static constexpr bool kHas{x.capitalize()} = true;\n" for x in TRANSFORMS},
}


def parse(name: str) -> Variant:
    """ "CAUSAL+WINDOW" -> CAUSAL + WINDOW. Raises ValueError for a name that nobody defined."""
    result, known = FULL, BUILT_IN | _defined
    for part in name.upper().split("+"):
        if found := _ROPE.fullmatch(part.strip()):
            result += rope(found[2] and int(found[2]), bool(found[1]))
        elif part.strip() in known:
            result += known[part.strip()]
        else:
            raise ValueError(f"expected a variant made of {', '.join(known)} joined by +, got {name!r}")
    return result


def define(
    name: str,
    *args: Argument,
    mask: str | Callable[..., torch.Tensor] | None = None,
    keys: tuple[str, str] | None = None,
    logits: str | Callable[..., torch.Tensor] | None = None,
    weights: str | Callable[..., torch.Tensor] | None = None,
    query: str | Callable[..., torch.Tensor] | None = None,
    key: str | Callable[..., torch.Tensor] | None = None,
    value: str | Callable[..., torch.Tensor] | None = None,
    output: str | Callable[..., torch.Tensor] | None = None,
    text: str | None = None,
) -> Variant:
    """A variant of one's own, used and composed like those that are built in. Examples: docs/variants.md.

    name: capitals, digits, _. One of
    mask: a condition that says which keys a query token sees;
    keys: the first key that a query token sees and the one after the last; neither goes down as q_pos goes
    up. Tiles outside are not loaded;
    logits: what becomes of the logit x (natural units, already scaled);
    weights: what a key of logit x weighs, in place of softmax.
    Or some of query, key, value, output: what becomes of element x, number `dim`, of a head's vector.

    All may use kv_len, request (index in the batch) and arguments by name; all but key and value q_pos, q_len
    and q_token (index in q); mask, logits, weights, key and value kv_pos (among the request's keys);
    logits, weights, query and output q_head; key and value kv_head; the last four dim. Tensors have an index:
    per request name[request], per token name[q_token], per key name[q_pos] and name[kv_pos], per head
    name[q_head], per dim name[dim]. A q_pos below 0, of more query tokens than keys, has the first key's
    element. fi_backend/expressions.py has the language.

    text: instead of an expression, the inside of a C++ struct that inherits fi::Feature (csrc/variant.h),
    with the functions of those names; the keywords are then their eager torch forms, with Feature's
    signature; for text with keys() that is mask. Text with a mask() overrides seen_before() as well: the
    first key that may be hidden.

    Raises ValueError for a name that is taken by something else, and for what is not in the language.
    """
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name) or name in BUILT_IN or _ROPE.fullmatch(name):
        raise ValueError(f"expected a name of capitals, digits and _ that is not built in, got {name!r}")
    forms = {"mask": mask, "keys": keys, "logits": logits, "weights": weights}
    forms |= {"query": query, "key": key, "value": value, "output": output}
    given = {kind: form for kind, form in forms.items() if form is not None}
    if len(given) != 1 and not (given and given.keys() <= set(TRANSFORMS)):
        raise ValueError(
            f"variant {name}: expected one of {', '.join(list(forms)[:4])}, or some of "
            f"{', '.join(TRANSFORMS)}, got {' and '.join(given) or 'none'}"
        )
    place = ("", 0)
    written: dict[str, Any] = dict(given)
    eager: dict[str, Any] = given
    if text is None:
        functions = {kind: functor(name, args, form, kind) for kind, form in given.items()}
        text = "\n".join(text for text, _ in functions.values())
        eager = {kind: form for kind, (_, form) in functions.items()}
    elif "keys" not in given and all(map(callable, given.values())):
        caller = sys._getframe(1)
        place = place_of(text, caller.f_code.co_filename, caller.f_lineno)
        written["text"] = text
    else:
        raise ValueError(
            f"variant {name}: expected mask, logits, weights, {', '.join(TRANSFORMS)} in torch beside text, "
            f"got {', '.join(f'{kind}={form!r}' for kind, form in given.items())}"
        )
    constants = "".join(_CONSTANTS[kind] for kind in given)
    body = f'struct {name} : Feature {{\n{constants}#line 1 "{name}"\n{text}\n}};\n'
    feature = Feature(
        name,
        f"fi::user::{name}",
        args,
        text=body,
        place=place,
        definition=(name, args, written),
        **{"mask" if kind == "keys" else kind: form for kind, form in eager.items()},
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
    return functools.reduce(Variant.__add__, (v for v, on in wanted if on), FULL)


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
