"""fi_backend: an attention engine for LLM serving. Everything public is named here."""

from . import variants
from .buckets import Buckets
from .compare import check
from .formats import BlockSparse, Composable, KVCache
from .measure import Times, measure
from .plan import Plan, Planner, Tiles
from .prefixes import PrefixFinder
from .run import append, run

__version__ = "0.1.0"
__all__ = [
    "BlockSparse",
    "Buckets",
    "Composable",
    "KVCache",
    "Plan",
    "Planner",
    "PrefixFinder",
    "Tiles",
    "Times",
    "append",
    "check",
    "measure",
    "run",
    "variants",
]
