"""A process that serves jobs with vLLM on the CPU, one engine after another, and prints one line of JSON.

Input (stdin): [{"name", "model", "engine": {}, "rounds": [[prompt ids, ...], ...], "max_tokens", "layer"}].
Each round is one batch on the same engine. "layer" overrides constructor arguments of our attention layers:
the negative controls. Optional: "prefix", a value of FI_PREFIX; "gaps": true.
Output: {name: {"tokens": [round][request][token], "gaps": of the best two log-probabilities, alike, "cached":
prompt tokens found in the prefix cache, "plans": how many plans our builders wrote, "saved": bytes that
shared prefixes saved, "seconds"}}.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import sys
import time
from typing import Any

MARK = "RESULT "
BLOCK = 32  # vLLM 0.32's own CPU attention takes multiples of this
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": BLOCK,
    "max_model_len": 512,
    "max_num_batched_tokens": 64,  # longer prompts are prefilled in chunks, beside decodes
    "max_num_seqs": 8,
    "seed": 0,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
}


def count_plans(worker: Any) -> int:
    """Runs in the worker: plans written by our builders, 0 if another backend served."""
    from fi_backend.serving.plans import plans_written

    return plans_written()


def saved_bytes(worker: Any) -> int:
    from fi_backend.serving import saved

    return saved.total()


def gaps(output: Any) -> list[float]:
    ranked = [sorted((x.logprob for x in step.values()), reverse=True) for step in output.logprobs or []]
    return [r[0] - r[1] for r in ranked]


def override_layers(overrides: dict[str, Any]) -> None:
    """Our layers get other arguments than the model gave them."""
    from fi_backend.vllm.impl import FiAttentionImpl

    original = inspect.unwrap(FiAttentionImpl.__init__)
    signature = inspect.signature(original)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        extra = given.pop("extra", {})
        # layers without the feature stay without it
        given.update({k: v for k, v in overrides.items() if given.get(k) is not None})
        original(**given, **extra)

    init.__wrapped__ = original  # type: ignore[attr-defined]
    FiAttentionImpl.__init__ = init  # type: ignore[method-assign]


def serve(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    start = time.monotonic()
    if "fi_backend.vllm.impl" in sys.modules or job.get("layer"):
        override_layers(job.get("layer", {}))
    os.environ["FI_PREFIX"] = job.get("prefix", "auto")
    llm = LLM(model=job["model"], **{**ENGINE, **job["engine"]})
    sampling = SamplingParams(
        temperature=0,
        max_tokens=job["max_tokens"],
        ignore_eos=True,
        detokenize=False,
        logprobs=2 if job.get("gaps") else None,
    )
    before = sum(llm.collective_rpc(count_plans))
    rounds, margins, cached = [], [], 0
    for prompts in job["rounds"]:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        rounds.append([list(o.outputs[0].token_ids) for o in outputs])
        margins.append([gaps(o.outputs[0]) for o in outputs])
        cached += sum(o.num_cached_tokens or 0 for o in outputs)
    plans = sum(llm.collective_rpc(count_plans)) - before
    saved = sum(llm.collective_rpc(saved_bytes))
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return {
        "tokens": rounds,
        "gaps": margins,
        "cached": cached,
        "plans": plans,
        "saved": saved,
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> None:
    jobs = json.load(sys.stdin)
    results = {}
    for job in jobs:
        results[job["name"]] = serve(job)
        print(f"{job['name']}: {results[job['name']]['seconds']} s", file=sys.stderr, flush=True)
    print(MARK + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
