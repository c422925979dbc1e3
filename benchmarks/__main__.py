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
    parser.add_argument("--shared-prefixes", action="store_true", help="prompts that begin alike, in vLLM")
    chosen, rest = parser.parse_known_args(arguments)
    names = [name for name in ("open_loop", "shared_prefixes") if getattr(chosen, name)]
    if names and chosen.engine != "vllm":
        flag = names[0].replace("_", "-")
        parser.error(f"expected --engine vllm with --{flag}, got {chosen.engine}")
    if len(names) > 1:
        parser.error("expected --open-loop or --shared-prefixes, got both")
    # an engine's start-up is timed: torch and the kernel suites are not imported before it
    import_module(f".serve_{(names or [chosen.engine])[0]}", __package__).main(rest)


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2:])
    else:
        import_module(".suites", __package__).main(sys.argv[1:])


if __name__ == "__main__":
    main()
