"""`python -m benchmarks SUITE ...` measures kernels, `python -m benchmarks serve ...` whole engines."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module


def serve(arguments: list[str]) -> None:
    """All other options are those of the module chosen here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks serve", add_help=False, allow_abbrev=False)
    parser.add_argument("--engine", choices=("vllm", "sglang"), required=True)
    other = parser.add_mutually_exclusive_group()
    add = other.add_argument
    add("--open-loop", dest="name", action="store_const", const="open_loop", help="latencies under load")
    add("--minimal", dest="name", action="store_const", const="minimal", help="beside the example engine")
    shared = "prompts that begin alike"
    add("--shared-prefixes", dest="name", action="store_const", const="shared_prefixes", help=shared)
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.engine == "sglang" and chosen.name in ("open_loop", "minimal"):
        option = chosen.name.replace("_", "-")
        parser.error(f"expected --engine vllm with --{option}, got sglang")
    # an engine's start-up is timed: torch and the kernel suites are not imported before it
    module = "_".join(filter(None, ("serve", chosen.engine, chosen.name)))
    import_module(f".{module}", __package__).main(rest)


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2:])
    else:
        import_module(".suites", __package__).main(sys.argv[1:])


if __name__ == "__main__":
    main()
