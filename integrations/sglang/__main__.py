"""Run a module of SGLang that loads no plugins before it reads its arguments, such as bench_one_batch:

python -m fi_backend.sglang sglang.bench_one_batch --model-path FOLDER --attention-backend fi ...
"""

from __future__ import annotations

import runpy
import sys


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__, file=sys.stderr)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    from sglang.srt.plugins import load_plugins

    load_plugins()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
