"""A small LLM engine: paged KV cache, continuous batching, chunked prefill, decode steps in CUDA graphs.

    python examples/minimal_engine.py --model FOLDER --prompt "What is a page table?" --prompt "Name a river."

Reads a Hugging Face folder of a Llama, such as SmolLM2-135M-Instruct, and decodes greedily. `Llama` is the
model, and knows nothing of caches; `Engine` decides what a step computes, and where keys and values lie.
Plans, appending to the cache, attention and graphs are fi_backend's.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

from fi_backend import BlockSparse, Buckets, KVCache, Planner, append, run

PAGE = 16  # tokens
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
LAYER = """
    input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj
    post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj
""".split()


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, head_dim] at the positions of cos and sin [tokens, 1, head_dim]."""
    return x * cos + x.unflatten(-1, (2, -1)).flip(-2).flatten(-2) * sin


def gated(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


class Llama:
    """The model as a function of tokens and positions; `attend` is called with q, k and v of each layer."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        config = json.loads((folder / "config.json").read_text())
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        kind, scaling = config["model_type"], rope.get("rope_type") or rope.get("type") or "default"
        if (kind, scaling) != ("llama", "default") or config.get("attention_bias"):
            raise ValueError(f"expected a llama without biases or scaled RoPE, got {kind}, RoPE {scaling}")
        self.hidden, self.eps = config["hidden_size"], config["rms_norm_eps"]
        self.q_heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or self.hidden // self.q_heads
        eos = config["eos_token_id"]
        self.eos = set(eos if isinstance(eos, list) else [eos])
        self.vocab, self.max_len = config["vocab_size"], config["max_position_embeddings"]

        w: dict[str, torch.Tensor] = {}
        for file in folder.glob("*.safetensors"):
            w |= {name: x.to(dtype) for name, x in load_file(file, device=str(device)).items()}
        self.embedding = w["model.embed_tokens.weight"]
        self.head = self.embedding if config.get("tie_word_embeddings") else w["lm_head.weight"]
        self.last_norm = w["model.norm.weight"]
        self.layers = []
        for i in range(config["num_hidden_layers"]):
            norm, q, k, v, o, mlp_norm, gate, up, down = (w[f"model.layers.{i}.{x}.weight"] for x in LAYER)
            self.layers.append((norm, torch.cat([q, k, v]), o, mlp_norm, torch.cat([gate, up]), down))

        theta = rope.get("rope_theta") or config["rope_theta"]
        frequency = theta ** -(torch.arange(0, self.head_dim, 2, device=device) / self.head_dim)
        angle = torch.outer(torch.arange(self.max_len, device=device), frequency).repeat(1, 2)[:, None]
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)  # [positions, 1, head_dim]
        self.sin[..., : self.head_dim // 2] *= -1
        gpu = device.type == "cuda"
        self._rotated = torch.compile(rotated) if gpu else rotated
        self._gated = torch.compile(gated) if gpu else gated

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        last: torch.Tensor,
        attend: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Logits [len(last), vocabulary] of those tokens whose indices are in last.

        A decode step takes as long as it has kernels: so products add to x, and torch fuses what it can.
        """
        x, cos, sin = self.embedding[tokens], self.cos[positions], self.sin[positions]
        for i, (norm, qkv, o, mlp_norm, gate_up, down) in enumerate(self.layers):
            heads = F.linear(self._norm(x, norm), qkv).unflatten(1, (-1, self.head_dim))
            qk, v = heads.split([self.q_heads + self.kv_heads, self.kv_heads], 1)
            q, k = self._rotated(qk, cos, sin).split([self.q_heads, self.kv_heads], 1)
            x.addmm_(attend(i, q, k, v).flatten(1), o.T)
            x.addmm_(self._gated(F.linear(self._norm(x, mlp_norm), gate_up)), down.T)
        return F.linear(self._norm(x[last], self.last_norm), self.head)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.hidden,), weight, self.eps)


@dataclass(eq=False)
class Request:
    tokens: list[int]  # the prompt, then what was decoded
    prompt_len: int
    max_len: int
    cached: int = 0  # tokens whose keys and values are in the cache
    seat: int = -1  # its row of the slot table while it runs
    pages: list[int] = field(default_factory=list)

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_len :]


class Engine:
    """Requests join by `add`, and each `step` takes all that run one token further, or a chunk of prompt.

    max_requests run at a time; chunk: prompt tokens that a step takes beyond one for each request.
    """

    def __init__(self, model: Llama, *, pages: int = 4096, max_requests: int = 64, chunk: int = 512) -> None:
        self.model, self.chunk = model, chunk
        self.device, dtype = model.embedding.device, model.embedding.dtype
        shape = (len(model.layers), 2, pages, PAGE, model.kv_heads, model.head_dim)
        self.caches = [KVCache.separate(k, v) for k, v in torch.empty(shape, dtype=dtype, device=self.device)]
        # The page table, token by token: where the keys of each seat's request lie. The host never reads it.
        width = -(-model.max_len // PAGE) * PAGE
        self.slots = torch.zeros(max_requests, width, dtype=torch.int32, device=self.device)
        self.planner = Planner(
            q_heads=model.q_heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            max_requests=max_requests,
            max_tokens=max_requests + chunk,
            device=self.device,
        )
        self.free_pages, self.free_seats = list(range(pages)), list(range(max_requests))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

        # A decode step has one token per request. Its padding is at position -1: no key is read or written.
        self.inputs = torch.zeros(3, max_requests, dtype=torch.int64, device=self.device)
        one_each = torch.arange(max_requests + 1, dtype=torch.int32, device=self.device)
        self.decode = Buckets(
            lambda tokens, *where: self.forward(one_each[: len(tokens) + 1], tokens, *where),
            self.inputs.unbind(),
            padding=(0, -1, 0),
            sizes=[n for n in (1, 2, 4, *range(8, max_requests, 8)) if n < max_requests] + [max_requests],
        )
        self.decode.capture()
        self.decoded, self.decode_seconds = 0, 0.0

    @torch.no_grad()
    def forward(
        self, qo_indptr: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, seats: torch.Tensor
    ) -> torch.Tensor:
        """The next token of each request. Called as it is for prompts, captured in graphs for decode steps.

        tokens, positions, seats [T] int64, request after request; qo_indptr [R + 1] int32: where each begins.
        """
        slots = self.slots[seats, positions].long().masked_fill(positions < 0, -1)
        last = qo_indptr[1:] - 1
        kv_len = (positions[last] + 1).int()
        batch = BlockSparse.from_token_table(qo_indptr, kv_len, self.slots, seats[last], PAGE)
        plan = self.planner.plan(batch)  # on the device, for all layers

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            append(self.caches[layer], k, v, slots)
            return run(plan, q, self.caches[layer])

        return self.model(tokens, positions, last, attend).argmax(-1)

    def add(self, tokens: list[int], max_tokens: int) -> Request:
        """A request for at most max_tokens after the prompt; `step` returns it when it is finished."""
        max_len = len(tokens) + max_tokens
        fits = min(self.model.max_len, self.caches[0].num_pages * PAGE)
        if not tokens or max_tokens < 1 or max_len > fits:
            raise ValueError(
                f"expected a prompt and an answer, at most {fits} tokens, got {len(tokens)} and {max_tokens}"
            )
        self.waiting.append(Request(list(tokens), len(tokens), max_len))
        return self.waiting[-1]

    def step(self) -> list[Request]:
        """Computes one batch, and returns the requests that are finished with it."""
        self._admit()
        if not self.running:
            return []
        start, spare = time.perf_counter(), self.chunk
        tokens: list[int] = []
        positions: list[int] = []
        seats: list[int] = []
        qo_indptr = [0]
        for r in self.running:
            end = min(len(r.tokens), r.cached + 1 + spare)
            spare -= end - r.cached - 1
            tokens += r.tokens[r.cached : end]
            positions += range(r.cached, end)
            seats += [r.seat] * (end - r.cached)
            qo_indptr.append(len(tokens))
            r.cached = end

        inputs = self._host([tokens, positions, seats])
        decoding = len(tokens) == len(self.running)
        if decoding:
            self.inputs[:, : len(tokens)].copy_(inputs, non_blocking=True)
            sampled = self.decode(len(tokens))
        else:
            begins, inputs = (
                x.to(self.device, non_blocking=True) for x in (self._host(qo_indptr, torch.int32), inputs)
            )
            sampled = self.forward(begins, *inputs)

        for r, token in zip(self.running, sampled.tolist(), strict=True):  # waits for the GPU
            if r.cached == len(r.tokens):  # otherwise its prompt goes on in the next step
                r.tokens.append(token)
        if decoding:
            self.decoded += len(tokens)
            self.decode_seconds += time.perf_counter() - start
        return self._release()

    def _admit(self) -> None:
        """Seats and pages for those that wait longest.

        A request gets at once all pages that it may come to need, so that none ever stops half-way for want
        of memory. Larger engines hand out pages one by one, and preempt a request when there are none left.
        """
        while self.waiting and self.free_seats:
            need = -(-self.waiting[0].max_len // PAGE)
            if need > len(self.free_pages):
                return
            request = self.waiting.popleft()
            request.seat = self.free_seats.pop()
            request.pages = [self.free_pages.pop() for _ in range(need)]
            slots = self._host([page * PAGE + i for page in request.pages for i in range(PAGE)], torch.int32)
            self.slots[request.seat, : len(slots)].copy_(slots, non_blocking=True)
            self.running.append(request)

    def _release(self) -> list[Request]:
        eos = self.model.eos
        finished = [
            r
            for r in self.running
            if len(r.tokens) > r.prompt_len and (r.tokens[-1] in eos or len(r.tokens) == r.max_len)
        ]
        for request in finished:
            self.running.remove(request)
            self.free_seats.append(request.seat)
            self.free_pages += request.pages
        return finished

    def _host(self, values: list[Any], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Page-locked where the device is a GPU: only then a copy to it does not wait for the GPU."""
        return torch.tensor(values, dtype=dtype, pin_memory=self.device.type == "cuda")


def serve(engine: Engine) -> Iterator[Request]:
    """Steps until nothing is left. Yields each request as it is finished; progress goes to stderr."""
    start = said = time.perf_counter()
    tokens = 0
    while engine.waiting or engine.running:
        for request in engine.step():
            tokens += len(request.answer)
            yield request
        if time.perf_counter() - said > 2:
            said = time.perf_counter()
            under_way = sum(len(r.answer) for r in engine.running)
            say(f"{len(engine.waiting)} wait, {len(engine.running)} run, {tokens + under_way} tokens decoded")
    seconds = time.perf_counter() - start
    rate = engine.decoded / max(engine.decode_seconds, 1e-9)
    say(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f}/s; steps without prompts: {rate:.0f}/s")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(words: list[str] | None = None) -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="A small LLM engine on fi_backend.")
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="Hugging Face folder of a Llama")
    add("--prompt", action="append", metavar="TEXT", help="what to ask (repeatable)")
    add("--bench", type=int, nargs=2, metavar=("N", "LENGTH"), help="instead: N prompts of random tokens")
    add("--max-tokens", type=int, default=128, metavar="N", help="most tokens of an answer (%(default)s)")
    add("--device", default="cuda" if gpu else "cpu", help="cpu or cuda (%(default)s)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, on a CPU float32")
    args = parser.parse_args(words)
    if bool(args.prompt) == bool(args.bench):
        parser.error("expected --prompt or --bench")

    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    say(f"loading {args.model} as {dtype} on {device}")
    model = Llama(args.model, device, dtype)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    if args.bench:
        count, length = args.bench
        model.eos.clear()
        prompts = [[random.randrange(model.vocab) for _ in range(length)] for _ in range(count)]
    else:
        prompts = [tokenizer.encode(CHAT.format(text)).ids for text in args.prompt]
    say("building kernels and capturing decode steps")
    engine = Engine(model, max_requests=min(len(prompts), 64))
    number = {engine.add(tokens, args.max_tokens): i for i, tokens in enumerate(prompts)}
    for request in serve(engine):
        if args.prompt:
            print(f"> {args.prompt[number[request]]}\n{tokenizer.decode(request.answer)}\n", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"minimal_engine: {error}")
