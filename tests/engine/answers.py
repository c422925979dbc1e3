"""What comparisons of real GPU engines share: the texts, engine runs side by side, results, agreement."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import engine_process

CONTEXT, PROMPTS, ANSWER = 2048, 32, 32
END = 2  # <|im_end|>
# bf16 logits of this model come in steps of 0.125: the best two are often equal, and FLASH_ATTN itself
# answers 10 of 32 prompts differently when it finds them in the prefix cache. f16 has steps of 1/64.
DTYPE = "float16"
PERPLEXITY_TOKENS = 22_000
MAX_REQUESTS = 256
TIMED, TIMED_BATCHES = 50, 20  # plans timed in a row, and how often
MANUAL = 200  # tokens of the text that half of the questions come after, the same for all of them
QUESTIONS = (
    """\
What is the capital of France?|How many days are there in a week?|What is two plus two?
Name the largest planet of the solar system.|What colour do you get when you mix blue and yellow?
Who wrote Romeo and Juliet?|What is the boiling point of water?|What is the opposite of hot?
Which animal is known as the king of the jungle?|How many legs does a spider have?
What is the chemical symbol of gold?|In which country are the pyramids of Giza?|What do bees make?
What is the first month of the year?|Which ocean lies between Europe and America?|What is ten minus four?
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
MAX_DIFFERENCE, MIN_AGREEING = 0.002, 30


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tokens_of(model: Path, text: Path | None) -> dict[str, Any]:
    """Token ids: chunks of real English text to score, and questions, half of them after a shared text."""
    from tokenizers import Tokenizer

    if text is not None:
        words = text.read_text()
    else:  # the documentation that every Python carries: prose, 150 k tokens
        from pydoc_data import topics

        words = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode(words).ids
    # a chunk leaves room for the one token that is generated
    size = CONTEXT - 8
    chunks = [ids[i : i + size] for i in range(0, PERPLEXITY_TOKENS, size)]
    if sum(len(c) - 1 for c in chunks) < 20_000:
        raise SystemExit(f"expected a text of at least 20,000 tokens, got {len(ids)}")
    prompts = []
    for i in range(PROMPTS):
        manual = "Keep this text in mind:\n" + tokenizer.decode(ids[:MANUAL]) + "\n\n" if i % 2 else ""
        question = QUESTIONS[i // 2 % len(QUESTIONS)]
        turns = (
            ("system", "You are a helpful AI assistant.<|im_end|>\n"),
            ("user", f"{manual}{question}<|im_end|>\n"),
            ("assistant", ""),
        )
        prompts.append(tokenizer.encode("".join(f"<|im_start|>{role}\n{say}" for role, say in turns)).ids)
    return {"chunks": chunks, "prompts": prompts}


def quietest(once: Callable[[], float]) -> dict[str, Any]:
    """Microseconds of something timed often.

    Other engines share the processors: the batch of calls with the smallest median was disturbed least.
    """
    for _ in range(TIMED):  # warm-up
        once()
    batches = []
    for _ in range(TIMED_BATCHES):
        batches.append(sorted(once() for _ in range(TIMED)))
        time.sleep(0.1)  # lets a neighbour's burst pass
    medians = [batch[TIMED // 2] for batch in batches]
    quiet = batches[medians.index(min(medians))]
    return {
        "median_us": round(quiet[TIMED // 2], 1),
        "p90_us": round(quiet[TIMED * 9 // 10], 1),
        "medians_us": sorted(round(m, 1) for m in medians),
    }


class Results:
    """Every stage of every engine, in a file as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.data.setdefault("engines", {})

    def engine(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.data["engines"].setdefault(name, {})
        return found

    def add(self, name: str, values: dict[str, Any]) -> None:
        with self._lock:
            self.engine(name).update(values)
            self.path.write_text(json.dumps(self.data) + "\n")


def agreement(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[int, list[str]]:
    """How many answers agree in all tokens; for the others where they part and how close that choice was."""
    equal, partings = 0, []
    for i, (a, b) in enumerate(zip(ours["tokens"], theirs["tokens"], strict=True)):
        step = next((s for s, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if step is None:  # one that ends earlier differs in its last token, <|im_end|>
            equal += 1
            continue
        gap, other = (x["gaps"][i][step] if x["gaps"] else None for x in (theirs, ours))
        partings.append(f"prompt {i} token {step}: {b[step]} against {a[step]}, logit gaps {gap} and {other}")
    return equal, partings


def run_engine(
    module: str,
    name: str,
    args: argparse.Namespace,
    end: float,
    results: Results,
    environment: dict[str, str],
) -> None:
    """One child of the module, until time.monotonic() is `end`; its log lies beside the results."""
    left = end - time.monotonic()
    if left < 45:
        say(f"{name}: no time left")
        return
    say(f"{name}: starting, at most {left:.0f} s")
    results.add(name, {"failed": None})
    command = [sys.executable, "-m", module, "--child", name]
    command += ["--model", str(args.model), "--tokens", str(args.tokens)]
    log = args.out.with_name(f"{args.out.stem}-{name}.log")

    def receive(values: dict[str, Any]) -> None:
        results.add(name, values)
        shown = [f"{k} {'done' if k.startswith('answers') else v}" for k, v in values.items()]
        say(f"{name}: {', '.join(shown)}")

    with log.open("w") as errors:
        code = engine_process.run(command, left, receive, environment, errors)
    if code != 0:
        late = time.monotonic() >= end
        reason = "stopped, no time left" if late else f"exit code {code}: {engine_process.last_error(log)}"
        results.add(name, {"failed": reason})
        say(f"{name}: failed, exit code {code}\n{engine_process.last_words(log)}")


def run_engines(
    module: str,
    names: list[str],
    args: argparse.Namespace,
    environment: Callable[[str], dict[str, str]] = lambda name: {},
    first_alone: bool = True,
) -> Results:
    """Children of the module for all names that are not done in the results file yet.

    first_alone: for engines that would otherwise compile the same kernels side by side.
    """
    end = time.monotonic() + 60 * args.minutes
    results = Results(args.out)
    args.tokens = args.out.with_name(f"{args.out.stem}-tokens.json")
    args.tokens.write_text(json.dumps(tokens_of(args.model, args.text)))
    todo = [n for n in dict.fromkeys(names) if not results.engine(n).get("done")]

    def one(name: str) -> None:
        run_engine(module, name, args, end, results, environment(name))

    if todo and first_alone:
        one(todo.pop(0))
    with ThreadPoolExecutor(args.parallel) as pool:
        list(pool.map(one, todo))
    return results


def parser(module: str, engines: list[str], description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    made.add_argument("--model", type=Path, required=True, help="model folder with a tokenizer.json")
    default = Path(module.rpartition(".")[2] + ".json")
    made.add_argument("--out", type=Path, default=default, help="results (JSON)")
    made.add_argument("--text", type=Path, help="English text to score (default: Python's own documentation)")
    made.add_argument("--engine", action="append", choices=engines, help="only this one (repeatable)")
    made.add_argument("--parallel", type=int, default=3, help="engines at a time on the GPU")
    made.add_argument("--minutes", type=float, default=8.5, help="time for everything (default: %(default)s)")
    made.add_argument("--child", help=argparse.SUPPRESS)
    made.add_argument("--tokens", type=Path, help=argparse.SUPPRESS)
    return made


def verdicts_for_tests(harness: Any, engines: list[str], folder: Path) -> dict[str, dict[str, object]]:
    """What gpu_vllm or gpu_sglang finds about these engines. Skips the test if there is no model folder."""
    import pytest

    # FI_TEST_MODEL: another model folder than the one `./demo` makes
    default = engine_process.ROOT / ".cache/models/SmolLM2-135M-Instruct"
    model = Path(os.environ.get("FI_TEST_MODEL") or default)
    if not (model / "tokenizer.json").exists():
        pytest.skip(f"no model folder {model}")
    options = ["--model", str(model), "--out", str(folder / "results.json"), "--minutes", "25"]
    args = parser(harness.MODULE, list(harness.ENGINES), None).parse_args(options)
    args.engine = engines
    found: dict[str, dict[str, object]] = harness.run_all(args).data["verdicts"]
    return found
