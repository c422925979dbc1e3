"""The SGLang adapter on SGLang's own pools, without an engine, against plain attention in float64."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from fi_backend.sglang.backend import FiAttentionBackend
from fi_backend.sglang.draft import FiDraftBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

pytestmark = pytest.mark.engine
CPU = [] if torch.cuda.is_available() else ["cpu"]  # a CUDA build of SGLang has no CPU path
DEVICES = [*CPU, pytest.param("cuda", marks=pytest.mark.gpu)]
WIDTH = 256  # tokens of a request
HEADS, KV_HEADS, DIM = 4, 2, 64


class World:
    """A runner with pools full of random keys, and requests of any lengths in it."""

    def __init__(
        self, device: str, kv_lens: tuple[int, ...], *, page: int = 1, swa: bool = False, **dims: int
    ):
        torch.manual_seed(sum(kv_lens) + page)
        self.device, self.kv_lens, self.page = device, kv_lens, page
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.kv_heads, self.dim = dims.get("kv_heads", KV_HEADS), dims.get("dim", DIM)
        requests = len(kv_lens)
        slots = page + (requests + 1) * WIDTH
        common: dict[str, Any] = {"page_size": page, "dtype": self.dtype, "head_num": self.kv_heads}
        common |= {"head_dim": self.dim, "device": device, "enable_memory_saver": False}
        if swa:
            self.pool: Any = SWAKVPool(
                size=slots,
                size_swa=slots,
                swa_attention_layer_ids=[0],
                full_attention_layer_ids=[1],
                **{k: v for k, v in common.items() if k != "enable_memory_saver"},
            )
            pages = torch.randperm(slots // page)
            mapping = (pages[:, None] * page + torch.arange(page)).flatten()
            self.pool.register_mapping(torch.cat([mapping, torch.tensor([-1])]).to(device))
        else:
            if "dim_vo" in dims:
                common["v_head_dim"] = dims["dim_vo"]
            self.pool = MHATokenToKVPool(size=slots, layer_num=1, enable_alt_stream=False, **common)
        self.req_to_token = ReqToTokenPool(
            size=requests, max_context_len=WIDTH, device=device, enable_memory_saver=False
        )
        order = list(range(1, 1 + (requests + 1) * WIDTH // page))
        random.Random(0).shuffle(order)
        free = [p * page + i for p in order for i in range(page)]
        for row in range(requests + 1):
            taken = torch.tensor(free[row * WIDTH : (row + 1) * WIDTH], dtype=torch.int32)
            self.req_to_token.req_to_token[row] = taken.to(device)
        for layer in range(2 if swa else 1):
            for buffer in (self.pool.get_key_buffer(layer), self.pool.get_value_buffer(layer)):
                buffer.normal_()

    def runner(self, **server_args: Any) -> Any:
        allocator = PagedTokenToKVPoolAllocator.__new__(PagedTokenToKVPoolAllocator)
        return SimpleNamespace(
            device=self.device,
            dtype=self.dtype,
            kv_cache_dtype=self.dtype,
            page_size=self.page,
            use_mla_backend=False,
            token_to_kv_pool=self.pool,
            token_to_kv_pool_allocator=allocator,
            req_to_token_pool=self.req_to_token,
            model_config=SimpleNamespace(
                context_len=WIDTH, is_multimodal=False, hf_config=SimpleNamespace(architectures=["Any"])
            ),
            server_args=SimpleNamespace(**{"enable_deterministic_inference": False, **server_args}),
        )

    def batch(self, mode: ForwardMode, new: tuple[int, ...], **fields: Any) -> Any:
        """SGLang's view of these requests, whose last `new` keys are this step's."""
        verify = mode.is_target_verify()
        lens = [n - q if verify else n for n, q in zip(self.kv_lens, new, strict=True)]
        rows = torch.arange(1, len(new) + 1, device=self.device)
        places = [self.slots(r)[n - q : n] for r, (n, q) in enumerate(zip(self.kv_lens, new, strict=True))]
        ragged = mode.is_extend() and not verify
        return SimpleNamespace(
            batch_size=len(new),
            forward_mode=mode,
            req_pool_indices=rows,
            seq_lens=torch.tensor(lens, device=self.device),
            out_cache_loc=torch.cat(places).long(),
            extend_seq_lens=torch.tensor(new, dtype=torch.int32, device=self.device) if ragged else None,
            extend_seq_lens_cpu=list(new) if ragged else None,
            spec_info=None,
            encoder_lens=None,
            **fields,
        )

    def slots(self, request: int) -> torch.Tensor:
        return self.req_to_token.req_to_token[request + 1]

    def keys(self, request: int, begin: int, end: int, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        at = self.slots(request)[begin:end].long()
        if isinstance(self.pool, SWAKVPool) and layer == 0:
            at = self.pool.full_to_swa_index_mapping[at]
        return tuple(
            x[at].double() for x in (self.pool.get_key_buffer(layer), self.pool.get_value_buffer(layer))
        )  # type: ignore[return-value]


def layer(**options: Any) -> RadixAttention:
    given = {
        "num_heads": HEADS,
        "head_dim": DIM,
        "scaling": DIM**-0.5,
        "num_kv_heads": KV_HEADS,
        "layer_id": 0,
    }
    return RadixAttention(**{**given, **options})


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, visible: torch.Tensor, cap: float = 0
) -> torch.Tensor:
    """q [Tq, heads, D], k [Tk, kv_heads, D], visible [Tq, Tk]; float64 on any device."""
    group = q.shape[1] // k.shape[1]
    x = scale * torch.einsum("qhd,khd->hqk", q.double(), k.repeat_interleave(group, 1))
    x = cap * torch.tanh(x / cap) if cap else x
    p = x.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(group, 1)).flatten(1)


def causal(new: int, total: int, window: int | None = None) -> torch.Tensor:
    q, k = torch.arange(total - new, total)[:, None], torch.arange(total)
    return (k <= q) & (k > q - (window or total + 1))


def check(world: World, actual: torch.Tensor, wanted: list[torch.Tensor]) -> None:
    tolerance = 1e-5 if world.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.double(), torch.cat(wanted), atol=tolerance, rtol=tolerance)


def query(world: World, tokens: int, heads: int = HEADS) -> torch.Tensor:
    fused = torch.randn(tokens, heads * world.dim + 96, dtype=world.dtype, device=world.device)
    return fused[:, : heads * world.dim]  # a slice, as of a fused projection


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page", [1, 16, 64])
@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("window", [-1, 20])
def test_extend_and_decode(device: str, page: int, cap: float, window: int) -> None:
    """Cap and window on both paths; the window holds one key more than SGLang's number says."""
    steps = {ForwardMode.EXTEND: (17, 1, 40), ForwardMode.MIXED: (1, 9, 1), ForwardMode.DECODE: (1, 1, 1)}
    for mode, new in steps.items():
        world = World(device, (17, 100, 201), page=page)
        backend, module = FiAttentionBackend(world.runner()), layer(logit_cap=cap, sliding_window_size=window)
        batch = world.batch(mode, new)
        q = query(world, sum(new))
        k, v = (torch.randn(sum(new), KV_HEADS, DIM, dtype=world.dtype, device=device) for _ in range(2))
        backend.init_forward_metadata(batch)
        out = backend.forward(q, k, v, module, batch)
        wanted = []
        for r, part in enumerate(q.view(-1, HEADS, DIM).split(new)):
            keys, values = world.keys(r, 0, world.kv_lens[r])
            visible = causal(new[r], world.kv_lens[r], window + 1 if window > 0 else None).to(device)
            wanted.append(attend(part, keys, values, module.scaling, visible, cap))
        check(world, out, wanted)
        at = batch.out_cache_loc
        assert torch.equal(world.pool.get_key_buffer(0)[at], k) and torch.equal(
            world.pool.get_value_buffer(0)[at], v
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("new", [(17, 3, 40), (1, 1, 1)])
def test_pool_of_windowed_layers(device: str, page: int, new: tuple[int, ...]) -> None:
    world = World(device, (17, 100, 201), page=page, swa=True)
    backend = FiAttentionBackend(world.runner())
    batch = world.batch(ForwardMode.DECODE if max(new) == 1 else ForwardMode.EXTEND, new)
    backend.init_forward_metadata(batch)
    for layer_id, window in ((0, 30), (1, -1)):
        module = layer(layer_id=layer_id, sliding_window_size=window)
        q = query(world, sum(new))
        k, v = (torch.randn(sum(new), KV_HEADS, DIM, dtype=world.dtype, device=device) for _ in range(2))
        out = backend.forward(q, k, v, module, batch)
        wanted = []
        for r, part in enumerate(q.view(-1, HEADS, DIM).split(new)):
            keys, values = world.keys(r, 0, world.kv_lens[r], layer_id)
            visible = causal(new[r], world.kv_lens[r], 31 if window > 0 else None).to(device)
            wanted.append(attend(part, keys, values, module.scaling, visible))
        check(world, out, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_layers_that_differ(device: str) -> None:
    """Head counts per layer, V narrower than K, no new keys, sinks."""
    new = (3, 1)
    world = World(device, (40, 90), dim_vo=32)
    backend, batch = FiAttentionBackend(world.runner()), world.batch(ForwardMode.EXTEND, new)
    backend.init_forward_metadata(batch)
    for heads in (2, 8):
        module = layer(num_heads=heads, v_head_dim=32)
        q = query(world, 4, heads)
        before = world.pool.get_key_buffer(0).clone()
        out = backend.forward(q, None, None, module, batch)
        assert out.shape == (4, heads * 32) and torch.equal(before, world.pool.get_key_buffer(0))
        parts = q.view(-1, heads, DIM).split(new)
        wanted = [
            attend(
                p,
                *world.keys(r, 0, world.kv_lens[r]),
                module.scaling,
                causal(new[r], world.kv_lens[r]).to(device),
            )
            for r, p in enumerate(parts)
        ]
        check(world, out, wanted)
        sinks = 5 + torch.randn(heads, dtype=world.dtype, device=device)
        with_sinks = backend.forward(q, None, None, module, batch, sinks=sinks)
        assert not torch.allclose(with_sinks, out, atol=1e-2)
        sinks.fill_(-100.0)  # weights loaded again, into the same tensor
        check(world, backend.forward(q, None, None, module, batch, sinks=sinks), wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_keys_are_kept_when_told(device: str) -> None:
    world = World(device, (40,))
    backend, batch = FiAttentionBackend(world.runner()), world.batch(ForwardMode.DECODE, (1,))
    backend.init_forward_metadata(batch)
    before = world.pool.get_key_buffer(0).clone()
    k = torch.ones(1, KV_HEADS, DIM, dtype=world.dtype, device=device)
    backend.forward(query(world, 1), k, k, layer(), batch, save_kv_cache=False)
    assert torch.equal(before, world.pool.get_key_buffer(0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page", [1, 16])
def test_encoder_and_cross_attention(device: str, page: int) -> None:
    world = World(device, (50, 70), page=page)
    encoder, new = (23, 40), (4, 1)
    backend = FiAttentionBackend(world.runner())
    batch = world.batch(ForwardMode.EXTEND, new, encoder_out_cache_loc=None)
    backend.init_forward_metadata(batch)
    q, both = query(world, 5), layer(attn_type=AttentionType.ENCODER_ONLY)
    parts = q.view(-1, HEADS, DIM).split(new)
    out = backend.forward(q, None, None, both, batch)
    everything = [
        torch.ones(n, m, dtype=torch.bool, device=device) for n, m in zip(new, world.kv_lens, strict=True)
    ]
    check(
        world,
        out,
        [
            attend(p, *world.keys(r, 0, world.kv_lens[r]), both.scaling, everything[r])
            for r, p in enumerate(parts)
        ],
    )
    batch.encoder_lens = torch.tensor(encoder, device=device)
    batch.seq_lens = torch.tensor(world.kv_lens, device=device) - batch.encoder_lens
    backend.init_forward_metadata(batch)
    for module in (layer(is_cross_attention=True), layer()):
        wanted = []
        for r, part in enumerate(parts):
            if module.is_cross_attention:
                begin, end = 0, encoder[r]
                visible = torch.ones(new[r], end, dtype=torch.bool, device=device)
            else:
                begin, end = encoder[r], world.kv_lens[r]
                visible = causal(new[r], end - begin).to(device)
            wanted.append(attend(part, *world.keys(r, begin, end), module.scaling, visible))
        check(world, backend.forward(q, None, None, module, batch), wanted)


def random_tree(size: int, seed: int) -> torch.Tensor:
    """[size, size]: row i sees itself and its ancestors."""
    rng, tree = random.Random(seed), torch.eye(size, dtype=torch.bool)
    for i in range(1, size):
        tree[i] |= tree[rng.randrange(i)]
    return tree


def verify_info(world: World, size: int, topk: int, seed: int) -> tuple[Any, list[torch.Tensor]]:
    chain = torch.ones(size, size, dtype=torch.bool).tril()
    trees = [chain if topk == 1 else random_tree(size, seed + r) for r in range(len(world.kv_lens))]
    visible = [
        torch.cat([torch.ones(size, n - size, dtype=torch.bool), t], 1)
        for n, t in zip(world.kv_lens, trees, strict=True)
    ]
    mask = torch.cat([x.flatten() for x in visible]).to(world.device)
    return SimpleNamespace(custom_mask=mask, draft_token_num=size, topk=topk), visible


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize(("size", "topk"), [(8, 1), (8, 4), (64, 8)])
def test_verify(device: str, page: int, size: int, topk: int) -> None:
    world = World(device, (size, 100, 201), page=page)
    backend, module, new = FiAttentionBackend(world.runner()), layer(), (size,) * 3
    batch = world.batch(ForwardMode.TARGET_VERIFY, new)
    batch.spec_info, visible = verify_info(world, size, topk, 7)
    q = query(world, 3 * size)
    backend.init_forward_metadata(batch)
    out = backend.forward(q, None, None, module, batch)
    wanted = [
        attend(p, *world.keys(r, 0, world.kv_lens[r]), module.scaling, visible[r].to(device))
        for r, p in enumerate(q.view(-1, HEADS, DIM).split(new))
    ]
    check(world, out, wanted)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("topk", [1, 4])
@pytest.mark.parametrize("swa", [False, True])
def test_verify_in_a_graph(device: str, topk: int, swa: bool) -> None:
    """Captured with the shortest requests; replayed with others, other trees, and two rows of padding."""
    size, bucket = 8, 4
    world = World(device, (100, 201), page=16, swa=swa)
    modules = [layer(layer_id=0, sliding_window_size=30 if swa else -1)] + (
        [layer(layer_id=1)] if swa else []
    )
    backend = FiAttentionBackend(world.runner())
    backend.init_cuda_graph_state(bucket, bucket * size)
    q = torch.randn(bucket * size, HEADS * DIM, dtype=world.dtype, device=device)
    static = SimpleNamespace(
        batch_size=bucket,
        forward_mode=ForwardMode.TARGET_VERIFY,
        req_pool_indices=torch.zeros(bucket, dtype=torch.int64, device=device),
        seq_lens=torch.ones(bucket, dtype=torch.int64, device=device),
        out_cache_loc=torch.zeros(bucket * size, dtype=torch.int64, device=device),
        spec_info=SimpleNamespace(
            custom_mask=torch.ones(bucket * size * WIDTH, dtype=torch.bool, device=device),
            draft_token_num=size,
            topk=topk,
        ),
        encoder_lens=None,
    )

    def forward() -> list[torch.Tensor]:
        backend.init_forward_metadata_in_graph(static)
        return [backend.forward(q, None, None, m, static) for m in modules]

    backend.init_forward_metadata_out_graph(static, in_capture=True)
    forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = forward()
    for seed in range(3):
        kv_lens = (size + 1, 199 - seed) if seed else (100, 201)
        world.kv_lens = kv_lens
        live = world.batch(ForwardMode.TARGET_VERIFY, (size, size))
        live.spec_info, visible = verify_info(world, size, topk, seed)
        static.req_pool_indices[:2], static.seq_lens[:2] = live.req_pool_indices, live.seq_lens
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        view = SimpleNamespace(**{**vars(static), "spec_info": live.spec_info})
        backend.init_forward_metadata_out_graph(view)
        graph.replay()
        torch.cuda.set_sync_debug_mode("default")
        for module, out in zip(modules, outs, strict=True):
            wanted = []
            for r, part in enumerate(q.view(bucket, size, HEADS, DIM)[:2]):
                seen = visible[r].to(device)
                if module.sliding_window_size > 0:
                    seen = seen & causal(size, kv_lens[r], 31).to(device)
                wanted.append(
                    attend(part, *world.keys(r, 0, kv_lens[r], module.layer_id), module.scaling, seen)
                )
            check(world, out[: 2 * size], wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("topk", "page"), [(1, 1), (1, 16), (4, 1)])
def test_draft_steps(device: str, topk: int, page: int) -> None:
    """Branch b's keys of step i: the request's, then the first i + 1 of its own slots."""
    steps, prefix = 4, (37, 100)
    world = World(device, prefix, page=page)
    backend, module = FiDraftBackend(world.runner(), topk, steps), layer()
    batch = world.batch(ForwardMode.DECODE, (1, 1))
    batch.spec_info = SimpleNamespace()
    backend.init_forward_metadata(batch)
    for step, child in enumerate(backend.attn_backends):
        q = query(world, 2 * topk)
        out = child.forward(q, None, None, module, batch)
        wanted = []
        for token, part in enumerate(q.view(-1, 1, HEADS, DIM)):
            r, branch = divmod(token, topk)
            k, v = world.keys(r, 0, prefix[r] + topk * steps)
            seen = torch.zeros(1, k.shape[0], dtype=torch.bool, device=device)
            seen[:, : prefix[r]] = True
            begin = prefix[r] + branch * steps
            seen[:, begin : begin + step + 1] = True
            wanted.append(attend(part, k, v, module.scaling, seen))
        check(world, out, wanted)


def test_batch_invariance_is_asked_for() -> None:
    world = World(DEVICES[0] if CPU else "cuda", (40, 90))
    backend, module = FiAttentionBackend(world.runner(enable_deterministic_inference=True)), layer()
    rows = []
    for new in ((30, 5), (1, 60)):
        batch = world.batch(ForwardMode.EXTEND, new)
        backend.init_forward_metadata(batch)
        torch.manual_seed(1)
        q = torch.randn(
            world.kv_lens[0] + world.kv_lens[1], HEADS * DIM, dtype=world.dtype, device=world.device
        )
        first, second = q[: world.kv_lens[0]][-new[0] :], q[world.kv_lens[0] :][-new[1] :]
        out = backend.forward(torch.cat([first, second]), None, None, module, batch)
        rows.append((out[new[0] - 1], out[-1]))
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"logit_cap": 5.0, "logit_capping_method": "other"}, "expected logit_capping_method tanh, got other"),
    ({"pos_encoding_mode": "ALIBI"}, "expected pos_encoding_mode NONE, got ALIBI"),
    ({"attn_type": AttentionType.ENCODER_ONLY, "sliding_window_size": 3}, "window in bidirectional"),
    ({"num_heads": 5}, "expected query heads a multiple of the 2 KV heads, got 5"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_layers_are_refused(options: dict[str, Any], message: str) -> None:
    world = World(DEVICES[0] if CPU else "cuda", (40,))
    runner = world.runner()
    runner.model = torch.nn.ModuleList([layer(**options)])
    with pytest.raises(NotImplementedError, match=message):
        FiAttentionBackend(runner)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kv_cache_dtype": torch.float8_e4m3fn},
            "expected a KV cache of the model's dtype .*, got torch.float8",
        ),
        ({"use_mla_backend": True}, "latent attention"),
        ({"attention_chunk_size": 8192}, "chunked local attention is not supported, got chunks of 8192"),
        ({"attn_cp_size": 2}, "context parallelism is not supported, got 2 ranks"),
    ],
)
def test_runners_are_refused(changes: dict[str, Any], message: str) -> None:
    runner = World(DEVICES[0] if CPU else "cuda", (40,)).runner()
    vars(runner).update(changes)
    with pytest.raises(NotImplementedError, match=message):
        FiAttentionBackend(runner)


def test_unknown_arguments_are_refused() -> None:
    world = World(DEVICES[0] if CPU else "cuda", (40,))
    backend, batch = FiAttentionBackend(world.runner()), world.batch(ForwardMode.DECODE, (1,))
    backend.init_forward_metadata(batch)
    with pytest.raises(NotImplementedError, match="q_rope"):
        backend.forward(query(world, 1), None, None, layer(), batch, q_rope=1.0, k_rope=None)


def test_hook_targets_exist() -> None:
    """SGLang reports a hook on a name that has gone in its log only."""
    from fi_backend.sglang.register import DRAFT_FACTORY
    from sglang.srt.speculative import draft_utils

    module, name, method = DRAFT_FACTORY.rsplit(".", 2)
    assert module == draft_utils.__name__ and callable(getattr(getattr(draft_utils, name), method))
    makers = draft_utils.DraftBackendFactory
    assert hasattr(makers, "_create_triton_decode_backend") and hasattr(
        makers, "_create_triton_prefill_backend"
    )
