"""`python -m benchmarks SUITE ...` measures kernels, `python -m benchmarks serve ...` whole engines."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module


def serve(arguments: list[str]) -> None:
    """All other options are those of the module chosen here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks serve", add_help=False, allow_abbrev=False)
    parser.add_argument("--engine", choices=("vllm", "sglang"), required=True)
    parser.add_argument("--open-loop", action="store_true", help="latencies under load, in vLLM")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.open_loop and chosen.engine != "vllm":
        parser.error(f"expected --engine vllm with --open-loop, got {chosen.engine}")
    # an engine's start-up is timed: torch and the kernel suites are not imported before it
    name = "open_loop" if chosen.open_loop else chosen.engine
    import_module(f".serve_{name}", __package__).main(rest)


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2:])
    else:
        import_module(".suites", __package__).main(sys.argv[1:])


if __name__ == "__main__":
    main()
