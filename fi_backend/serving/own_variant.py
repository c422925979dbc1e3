"""FI_VARIANT=FILE.py:NAME: a variant of one's own in every layer that an engine serves."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

from .. import env, variants
from ..jit.toolchain import log


def own_variant() -> tuple[variants.Variant, dict[str, Any]]:
    """What NAME in FILE is: a variant, or (variant, {argument: value}); FULL without FI_VARIANT. ValueError
    for anything else."""
    return _load(env.variant())


@functools.cache
def _load(place: str) -> tuple[variants.Variant, dict[str, Any]]:
    if not place:
        return variants.FULL, {}
    file, colon, name = place.rpartition(":")
    if not colon or not Path(file).is_file():
        raise ValueError(f"expected FI_VARIANT to be FILE.py:NAME of a file that exists, got {place!r}")
    spec = importlib.util.spec_from_file_location("fi_backend_own_variant", Path(file).resolve())
    if spec is None or spec.loader is None:
        raise ValueError(f"expected FI_VARIANT to name a Python file, got {file!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    variant, args = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
    if not isinstance(variant, variants.Variant) or not isinstance(args, dict):
        raise ValueError(
            f"FI_VARIANT={place}: expected {name} to be a variant or (variant, arguments), got {found!r}"
        )
    per_step = [a.name for a in variant.args if a.kind == "tensor" and a.per != "head"]
    if per_step:
        raise ValueError(
            f"FI_VARIANT={place}: expected arguments that do not change, got {', '.join(per_step)}"
        )
    log().info("every layer computes %s too, from %s", variant, file)
    return variant, args
