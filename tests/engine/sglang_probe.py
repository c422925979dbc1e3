"""SGLang's scheduler process with questions added: does planning wait for the device, and what does it cost.

`Engine.collective_rpc(name)` calls a method of the scheduler and returns nothing: answers go to a file.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .answers import MAX_REQUESTS, quietest

_guarded = {"init_forward_metadata": 0, "init_forward_metadata_out_graph": 0, "plan": 0}
_full: dict[str, Any] = {}  # what a decode step of MAX_REQUESTS passed to each of them last


def probed_scheduler(*args: Any, **kwargs: Any) -> None:
    """For Engine.run_scheduler_process_func."""
    from sglang.srt.managers import scheduler

    scheduler.Scheduler.guard_plans = guard_plans
    scheduler.Scheduler.write_answers = write_answers
    scheduler.run_scheduler_process(*args, **kwargs)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raises where the host waits for the device."""
    import torch

    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def guard_plans(scheduler: Any) -> None:
    """From here on whatever our backend does once per step raises if it waits for the device."""
    from fi_backend.sglang.step import Step

    backend = scheduler.tp_worker.model_runner.attn_backend

    def guard(owner: Any, name: str, batch_of: Any) -> None:
        original = getattr(owner, name)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            batch = batch_of(args)
            if batch.batch_size == MAX_REQUESTS and batch.forward_mode.is_decode():
                _full[name] = args
            _guarded[name] += 1
            with no_waiting():
                return original(*args, **kwargs)

        setattr(owner, name, guarded)

    for name in ("init_forward_metadata", "init_forward_metadata_out_graph"):
        guard(backend, name, lambda args: args[0])
    guard(Step, "plan", lambda args: args[0].batch)


def write_answers(scheduler: Any, path: str) -> None:
    from fi_backend.serving.plans import plans_written

    backend = scheduler.tp_worker.model_runner.attn_backend
    found: dict[str, Any] = {"plans": plans_written(), "guarded": dict(_guarded)}
    if "init_forward_metadata_out_graph" in _full:
        found["replay_256"] = timed(backend, "init_forward_metadata_out_graph", ())
    elif "plan" in _full:  # the first layer asks for the plan of all
        found["decode_256"] = timed(backend, "init_forward_metadata", _full["plan"][1:])
    Path(path).write_text(json.dumps(found))


def timed(backend: Any, name: str, plan: tuple[Any, ...]) -> dict[str, Any]:
    """Host microseconds of a step's own work at MAX_REQUESTS decodes, the device idle before it."""
    import torch

    batch = _full[name][0]

    def once() -> float:
        with no_waiting():
            start = time.perf_counter()
            getattr(backend, name)(batch)
            if plan:
                backend.forward_metadata.plan(*plan)
            seconds = time.perf_counter() - start
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return 1e6 * seconds

    return quietest(once)
