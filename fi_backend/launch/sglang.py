"""SGLang: its Engine, or its HTTP server. The scheduler, and with it attention, is a process of its own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

from .. import jit
from ..progress import Ticker
from .report import say, show, what_ran

PLUGINS = "SGLANG_PLUGINS"
BACKEND = "fi"
STATE = "fi_backend"  # our key in the scheduler's internal state


def environment(gpu: bool) -> dict[str, str]:
    # every process of the engine would list the quantisations that this machine has no kernels for
    warnings.simplefilter("ignore", UserWarning)
    return {"PYTHONWARNINGS": "ignore::UserWarning"}


def options(model: str, gpu: bool) -> dict[str, Any]:
    """Arguments of SGLang's ServerArgs."""
    common = {
        "model_path": model,
        "attention_backend": BACKEND,
        "page_size": 16,
        "context_length": 2048,
        "max_running_requests": 16,
        "random_seed": 0,
        "skip_server_warmup": True,
        "log_level": "error",
    }
    if gpu:
        # flashinfer's sampler would compile kernels of its own
        return {**common, "mem_fraction_static": 0.5, "sampling_backend": "pytorch"}
    # float32 is exact, and as fast as bfloat16 on a processor without bfloat16 arithmetic
    return {
        **common,
        "device": "cpu",
        "dtype": "float32",
        "disable_cuda_graph": True,
        "max_total_tokens": 8192,
    }


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    """SGLang's scheduler process; its internal state, which /server_info shows, also tells what we did."""
    from sglang.srt.managers.scheduler import Scheduler, run_scheduler_process

    from ..serving import kernels, plans

    original = Scheduler.get_internal_state

    def get_internal_state(self: Any, request: Any) -> Any:
        reply = original(self, request)
        reply.internal_state[STATE] = {"plans": plans.plans_written(), "executors": kernels.loaded()}
        return reply

    Scheduler.get_internal_state = get_internal_state
    run_scheduler_process(*args, **kwargs)


def prepare() -> None:
    """Load the plugins, and build what every executor needs: the scheduler would end in SGLang's traceback.

    Raises BuildError, and RuntimeError if our backend is no choice.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.plugins import load_plugins

    jit.core()
    load_plugins()
    if BACKEND not in ATTENTION_BACKENDS:
        raise RuntimeError(
            f"expected SGLang to know the attention backend {BACKEND}: the plugin did not register"
        )


def answer(options: dict[str, Any], prompt: str, max_tokens: int) -> None:
    """Start the engine, stream the answer to stdout as its tokens come, then say what ran and how fast.

    Raises RuntimeError if another attention backend served the prompt.
    """
    with Ticker("launch 1/2: start SGLang, build kernels"):
        from sglang.srt.entrypoints.engine import Engine

        prepare()

        class Ours(Engine):
            run_scheduler_process_func = staticmethod(run_scheduler)

        engine = Ours(**options)
    say("launch 2/2: answer")
    chat = [{"role": "user", "content": prompt}]
    tokenizer = engine.tokenizer_manager.tokenizer
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    sampling = {"temperature": 0, "max_new_tokens": max_tokens}

    def pieces() -> Iterator[tuple[str, int]]:
        text, tokens = "", 0
        for so_far in engine.generate(input_ids=ids, sampling_params=sampling, stream=True):
            now = so_far["meta_info"]["completion_tokens"]
            yield so_far["text"][len(text) :], now - tokens
            text, tokens = so_far["text"], now

    figures = show(pieces())
    state = engine.get_server_info()["internal_states"][0][STATE]
    engine.shutdown()
    say(f"{figures}; {what_ran('SGLang', state['plans'], state['executors'])}")


def serve(options: dict[str, Any], port: int) -> None:
    """SGLang's HTTP server in this process, on 127.0.0.1; it ends with Ctrl-C."""
    with Ticker("launch 1/2: load SGLang"):
        from sglang.srt.entrypoints.http_server import launch_server
        from sglang.srt.server_args import ServerArgs
        from sglang.srt.utils import kill_process_tree

        prepare()
    name = os.path.basename(os.path.normpath(options["model_path"]))
    say(f"launch 2/2: start SGLang, build kernels, then serve {name} at http://127.0.0.1:{port}/v1")
    args = ServerArgs(**options, host="127.0.0.1", port=port, served_model_name=name)
    try:
        launch_server(args, run_scheduler_process_func=run_scheduler)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
