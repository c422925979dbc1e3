"""A process that serves jobs with SGLang on the CPU, one engine after another: a line of JSON for each.

Input (stdin): [{"name", "model", "engine": {}, "rounds": [{"prompts": [ids, ...], "n": answers of each}],
"max_tokens", "layer"}]. Each round is one batch on the same engine. "layer" overrides attributes of the
model's attention layers: the negative controls. Optional: "prefix", a value of FI_PREFIX; "gaps": true.
Output: {name: {"tokens": [round][answer][token], "gaps": of the best two log-probabilities, alike, "cached":
prompt tokens found in the radix tree, "plans": how many our backend made, "saved": bytes that shared prefixes
saved, "mixed": steps that held both prefills and decodes, "seconds"}}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

MARK = "RESULT "
LAYER = "RUN_SGLANG_LAYER"  # hands the overrides to the scheduler's process
ENGINE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "disable_cuda_graph": True,
    "context_length": 512,
    "max_total_tokens": 4096,
    "max_running_requests": 8,
    "chunked_prefill_size": 64,  # longer prompts are prefilled in chunks, beside decodes
    "enable_mixed_chunk": True,
    "skip_tokenizer_init": True,
    "skip_server_warmup": True,
    "random_seed": 0,
    "log_level": "error",
}


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    """The scheduler's process: overrides layers, counts mixed steps, then runs as the launcher's does."""
    from sglang.srt.managers.scheduler import Scheduler

    from fi_backend.launch import sglang
    from fi_backend.serving import saved

    counts = {"mixed": 0}
    run_batch, get_state = Scheduler.run_batch, Scheduler.get_internal_state

    def counted(self: Any, batch: Any, *rest: Any, **named: Any) -> Any:
        counts["mixed"] += batch.forward_mode.is_mixed()
        return run_batch(self, batch, *rest, **named)

    def state(self: Any, request: Any) -> Any:
        reply = get_state(self, request)
        reply.internal_state |= {**counts, "saved": saved.total()}
        return reply

    Scheduler.run_batch, Scheduler.get_internal_state = counted, state
    if overrides := json.loads(os.environ[LAYER]):
        override_layers(overrides)
    sglang.run_scheduler(*args, **kwargs)


def override_layers(overrides: dict[str, Any]) -> None:
    from sglang.srt.layers.radix_attention import RadixAttention

    original = RadixAttention.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for name, value in overrides.items():
            if getattr(self, name) not in (None, -1, 0.0):  # layers without the feature stay without it
                setattr(self, name, value)

    RadixAttention.__init__ = init


def serve(job: dict[str, Any]) -> dict[str, Any]:
    from sglang.srt.entrypoints.engine import Engine

    from fi_backend.launch.sglang import STATE

    class Counting(Engine):
        run_scheduler_process_func = staticmethod(run_scheduler)

    start = time.monotonic()
    os.environ[LAYER] = json.dumps(job.get("layer", {}))
    os.environ["FI_PREFIX"] = job.get("prefix", "auto")
    engine = Counting(model_path=job["model"], **{**ENGINE, **job["engine"]})
    wanted = {"return_logprob": True, "top_logprobs_num": 2} if job.get("gaps") else {}
    rounds, margins, cached = [], [], 0
    for batch in job["rounds"]:
        sampling = {
            "temperature": 0,
            "max_new_tokens": job["max_tokens"],
            "ignore_eos": True,
            "n": batch["n"],
        }
        answers = engine.generate(input_ids=batch["prompts"], sampling_params=sampling, **wanted)
        rounds.append([a["output_ids"] for a in answers])
        steps = [a["meta_info"].get("output_top_logprobs", []) for a in answers]
        margins.append([[s[0][0] - s[1][0] for s in answered] for answered in steps])
        cached += sum(a["meta_info"]["cached_tokens"] for a in answers)
    state = engine.get_server_info()["internal_states"][0]
    engine.shutdown()
    return {
        "tokens": rounds,
        "gaps": margins,
        "cached": cached,
        "plans": state[STATE]["plans"],
        "saved": state["saved"],
        "mixed": state["mixed"],
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> None:
    for job in json.load(sys.stdin):
        result = serve(
            job
        )  # a scheduler that fails kills this process: what was served before is out by then
        print(f"{job['name']}: {result['seconds']} s", file=sys.stderr, flush=True)
        print(MARK + json.dumps({job["name"]: result}), flush=True)


if __name__ == "__main__":
    main()
