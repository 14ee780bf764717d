"""The operator alone against SDPA, and how close it comes to moving its bytes at copy speed."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatten_diffusion.mixers import Context, WindowAttention
from flatten_diffusion.ops import available_backends, focused_linear_attention

from .architectures import free_memory
from .timing import Candidate, measure

COPY_BYTES = 128 * 2**20


@dataclass(frozen=True)
class OperatorSettings:
    """What is timed.

    Attributes:
        batch, heads, head_dim, dtype: of query, key and value [batch, N, heads, head_dim].
        kernel_size: of the depthwise convolution; 0 for none.
        feature_maps, window: also with maps of query and key; also joined with windows of this side.
        backward: forward and backward together.
        compiled: also under torch.compile.
        graphs: on CUDA, replays of captured graphs, without the cost of launching.
        softmax: SDPA too.
        all_backends: the slow ones too: the readable reference, and softmax by plain products.
        public: on CUDA, the nearest kernel of other packages; see `public_variants`.
    """

    batch: int = 1
    heads: int = 8
    head_dim: int = 40
    dtype: torch.dtype = torch.float32
    kernel_size: int = 5
    focusing_factor: float = 3.0
    feature_maps: bool = False
    window: int = 0
    backward: bool = False
    compiled: bool = False
    graphs: bool = False
    softmax: bool = True
    all_backends: bool = True
    public: bool = False
    seed: int = 0


def sdpa_backends(device: torch.device) -> dict[str, SDPBackend]:
    """Backends of scaled_dot_product_attention by name; one that does not run at a shape says so when it is tried."""
    found = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    if device.type == "cuda":
        found |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    return found


def most_square_grid(tokens: int) -> tuple[int, int]:
    """(height, width) of as many tokens, height at most width."""
    height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return height, tokens // height


def measure_operator(
    tokens: int,
    device: torch.device,
    settings: OperatorSettings,
    *,
    rounds: int,
    warmup: int,
    seconds: float = math.inf,
    memory: bool = True,
) -> dict[str, Any]:
    """Times every variant, in turn, and a large copy in the same rounds.

    Returns:
        JSON-ready: `copy_bytes_per_second` (read plus written), `bytes_moved` (query, key and value read once, the
        output written once), and per variant its measurement, `speedup_over_sdpa` (the fastest softmax's time over its
        own) and, forward, `of_copy_bandwidth`: the share of the copy's speed at which it moves those bytes.
    """
    candidates = operator_candidates(tokens, device, settings)
    needed, free = 12 * settings.batch * settings.heads * tokens**2, free_memory(device)
    too_large = device.type == "cpu" and free is not None and needed > free and "sdpa:math" in candidates
    if too_large:
        del candidates["sdpa:math"]
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    candidates["copy"] = Candidate(lambda: target.copy_(source))
    measured = measure(
        candidates, device, rounds=rounds, warmup=warmup, seconds=seconds, label=f"{tokens} tokens", memory=memory
    )
    copying = measured.pop("copy").median
    bandwidth = 2 * COPY_BYTES / copying if copying else None
    moved = 4 * settings.batch * tokens * settings.heads * settings.head_dim * settings.dtype.itemsize
    softmax = min((m.median for name, m in measured.items() if name.startswith("sdpa") and m.median), default=None)
    variants: dict[str, Any] = {}
    for name, measurement in measured.items():
        median = measurement.median
        share = moved / median / bandwidth if median and bandwidth and not settings.backward else None
        variants[name] = measurement.as_dict() | {
            "speedup_over_sdpa": softmax / median if softmax and median else None,
            "of_copy_bandwidth": share,
        }
    if too_large:
        variants["sdpa:math"] = {"failure": "out of memory"}
    return {"tokens": tokens, "bytes_moved": moved, "copy_bytes_per_second": bandwidth, "variants": variants}


def operator_candidates(tokens: int, device: torch.device, settings: OperatorSettings) -> dict[str, Candidate]:
    """Every variant by name, on query, key and value as a projection leaves them: heads are views."""
    generator = torch.Generator("cpu").manual_seed(settings.seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, settings.dtype)

    heads, head_dim = settings.heads, settings.head_dim
    shape = (settings.batch, tokens, heads, head_dim)
    query, key, value = (random(*shape).requires_grad_(settings.backward) for _ in range(3))
    extra: dict[str, Any] = {"focusing_factor": settings.focusing_factor}
    if settings.kernel_size:
        extra["conv_weight"] = random(heads * head_dim, 1, settings.kernel_size, settings.kernel_size)
        extra["grid"] = most_square_grid(tokens)
    upstream = random(*shape)
    maps: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in ("query_map", "key_map") if settings.feature_maps else ():
        weight = torch.eye(head_dim) + 0.1 * torch.randn(heads, head_dim, head_dim, generator=generator)
        pair = weight.to(device), torch.randn(heads, head_dim, generator=generator).to(device)  # float32, as learned
        maps[name] = (pair[0].requires_grad_(settings.backward), pair[1].requires_grad_(settings.backward))

    def candidate(forward: Callable[[], torch.Tensor], *around: Any, heads_first: bool = False) -> Candidate:
        inputs = (query, key, value, *(tensor for pair in maps.values() for tensor in pair))
        grad = upstream.transpose(1, 2) if heads_first else upstream

        def both() -> object:
            return torch.autograd.grad(forward(), inputs, grad, allow_unused=True)

        def inside() -> ExitStack:
            stack = ExitStack()
            for context in around if settings.backward else (*around, torch.inference_mode):
                stack.enter_context(context())
            return stack

        return Candidate(both if settings.backward else forward, inside)

    def softmax() -> torch.Tensor:
        return F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))

    def linear(backend: str, **maps: Any) -> Callable[[], torch.Tensor]:
        return lambda: focused_linear_attention(query, key, value, backend=backend, **extra, **maps)

    def windowed(backend: str) -> Callable[[], torch.Tensor]:
        window = WindowAttention(heads, settings.window).to(device, settings.dtype).requires_grad_(False)
        window.backend = backend
        run, grid = linear(backend), most_square_grid(tokens)
        return lambda: window(run(), query, key, value, Context(grid))[0]

    found: dict[str, Candidate] = {}
    if settings.softmax:
        found["sdpa"] = candidate(softmax, heads_first=True)
        for name, kind in sdpa_backends(device).items():
            if settings.all_backends or (device.type == "cuda" and name != "math"):
                found[f"sdpa:{name}"] = candidate(softmax, partial(sdpa_kernel, kind), heads_first=True)
    for backend in available_backends(device):
        if backend == "reference" and not settings.all_backends:
            continue
        found[f"linear:{backend}"] = candidate(linear(backend))
        if maps:
            found[f"linear:{backend}+maps"] = candidate(linear(backend, **maps))
        if settings.window:
            found[f"linear:{backend}+windows"] = candidate(windowed(backend))
    if settings.public and device.type == "cuda" and not settings.backward:
        found |= {name: candidate(forward) for name, forward in public_variants(query, key, value).items()}
    if settings.compiled:
        found["linear (compiled)"] = candidate(torch.compile(linear("auto"), dynamic=False))
    return {name: _captured(found[name]) for name in found} if settings.graphs else found


def public_variants(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    """Triton linear attentions of other packages on the same tensors.

    None on the package index has this operation, attention over all tokens (looked at: fla-core 0.6.0 and
    lightning-attn 0.0.5, causal only; flash-bidirectional-linear-attention, which has it, is not on the index). The
    nearest, fla's chunked causal kernel, multiplies about as much; it runs on rectified query and key, without
    focused map and convolution.
    """
    positive = [F.relu(x) + 1e-6 for x in (query, key)]

    def run() -> torch.Tensor:
        try:
            linear: Any = importlib.import_module("fla.ops.linear_attn")
        except ImportError as error:
            raise RuntimeError(f"fla-core is not installed ({error})") from error
        output: torch.Tensor = linear.chunk_linear_attn(*positive, value, normalize=True)[0]
        return output

    return {"public:fla chunk (causal, no map)": run}


def _captured(candidate: Candidate) -> Candidate:
    """Replays a CUDA graph, captured at the first call."""
    graphs: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        if not graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    candidate.call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                candidate.call()
            graphs.append(graph)
        graphs[0].replay()

    return Candidate(replay, candidate.around)
