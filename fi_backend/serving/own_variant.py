"""FILE.py:NAME, a variant of one's own in every layer that an engine serves: from FI_VARIANT or an option."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import env, variants
from ..jit.toolchain import log
from .refuse import refuse


def own_variant(place: str = "") -> tuple[variants.Variant, dict[str, Any]]:
    """What NAME in FILE is: a variant, or (variant, {argument: value}). place: an option of the engine; if
    neither it nor FI_VARIANT is given, FULL. ValueError for anything else, and if they name two."""
    given = env.variant()
    if place and given and place != given:
        raise ValueError(f"expected one variant of one's own, got {place} and FI_VARIANT={given}")
    return _load(place or given)


def variant_option(additional_config: Any) -> str:
    """fi_variant of an engine's own mapping for plugins. Keys without fi_ belong to others."""
    given = additional_config if isinstance(additional_config, Mapping) else {}
    unknown = [key for key in given if key.startswith("fi_") and key != "fi_variant"]
    if unknown:
        refuse(f"expected fi_variant in additional_config, got {', '.join(unknown)}")
    place = given.get("fi_variant", "")
    if not isinstance(place, str):
        refuse(f"expected fi_variant to be FILE.py:NAME, got {place!r}")
    return place


@functools.cache
def _load(place: str) -> tuple[variants.Variant, dict[str, Any]]:
    if not place:
        return variants.FULL, {}
    file, colon, name = place.rpartition(":")
    if not colon or not Path(file).is_file():
        raise ValueError(f"expected a variant as FILE.py:NAME of a file that exists, got {place!r}")
    spec = importlib.util.spec_from_file_location("fi_backend_own_variant", Path(file).resolve())
    if spec is None or spec.loader is None:
        raise ValueError(f"expected a variant in a Python file, got {file!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    variant, args = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
    if not isinstance(variant, variants.Variant) or not isinstance(args, dict):
        raise ValueError(f"{place}: expected {name} to be a variant or (variant, arguments), got {found!r}")
    per_step = [a.name for a in variant.args if a.kind == "tensor" and a.per != "head"]
    if per_step:
        raise ValueError(f"{place}: expected arguments that do not change, got {', '.join(per_step)}")
    log().info("every layer computes %s too, from %s", variant, file)
    return variant, args
