"""Whom ours is compared with; each is imported when it is measured."""

from __future__ import annotations

import argparse

from . import peer_fa3, peer_flashinfer, peer_flex, peer_rope
from .implementations import Prepare

FAMILIES: dict[str, dict[str, Prepare]] = {
    "fa3": peer_fa3.PEERS,
    "flashinfer": peer_flashinfer.WRAPPERS,
    "flex": peer_flex.PEERS,
    "rope": peer_rope.PEERS,
}
PEERS = {name: prepare for family in FAMILIES.values() for name, prepare in family.items()}


def names(text: str) -> list[str]:
    """An argument like "fa3,flashinfer_fa2": families and peers."""
    found: list[str] = []
    for word in filter(None, text.split(",")):
        if word not in FAMILIES and word not in PEERS:
            known = ", ".join({**FAMILIES, **PEERS})
            raise argparse.ArgumentTypeError(f"expected peers among {known}, got {word}")
        found += list(FAMILIES[word]) if word in FAMILIES else [word]
    return list(dict.fromkeys(found))
