"""Benchmark of the operator alone, run from the repository's root: `python -m eval.bench_operator`.

Every round runs each variant once, in turn, so that a busy machine slows all of them alike; medians and ratios are what
counts. `ratio_to_sdpa` is the best softmax backend's time over the variant's. `ratio_to_bytes` is the time of reading
query, key and value and writing the output once, at the copy bandwidth measured in the same rounds, over the variant's.
On CUDA, `public:...` is the nearest Triton linear attention on the package index, where installed: see
`public_variants`. `python -m eval.bench_cpu` makes the whole table for two CPU cores.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatten_diffusion.mixers import WindowAttention
from flatten_diffusion.ops import available_backends, focused_linear_attention
from flatten_diffusion.models.timing import device_name

from .files import write_json
from .timing import seconds_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COPY_BYTES = 128 * 2**20
SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=40)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--kernel_size", type=int, default=0, help="depthwise convolution; 0 leaves it out")
    parser.add_argument("--focusing_factor", type=float, default=3.0)
    parser.add_argument("--feature_maps", action="store_true", help="also time the operator with maps of query and key")
    parser.add_argument("--window", type=int, default=0, help="also time the operator joined with windows of this side")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--backward", action="store_true", help="time forward and backward together")
    parser.add_argument("--compile", action="store_true", help="also time the operator under torch.compile")
    parser.add_argument("--graphs", action="store_true", help="CUDA: replay captured graphs (no launch cost)")
    parser.add_argument("--no_sdpa", action="store_true")
    parser.add_argument("--no_public", action="store_true", help="leave out Triton linear attentions of other packages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args(arguments)
    if options.graphs and (torch.device(options.device).type != "cuda" or options.backward):
        parser.error("--graphs needs a CUDA device and no --backward")
    if options.kernel_size < 0 or (options.kernel_size and options.kernel_size % 2 == 0):
        parser.error("--kernel_size must be odd, or 0")
    if options.window < 0 or options.window == 1:
        parser.error("--window must be at least 2, or 0")
    return options


def most_square_grid(tokens: int) -> tuple[int, int]:
    height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return height, tokens // height


def variants(options: argparse.Namespace, tokens: int) -> dict[str, Callable[[], object]]:
    """One callable per variant, on query, key and value as a projection leaves them: heads are views."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    generator = torch.Generator().manual_seed(options.seed)
    query, key, value = (
        torch.randn(options.batch, tokens, options.heads, options.head_dim, generator=generator)
        .to(device, dtype)
        .requires_grad_(options.backward)
        for _ in range(3)
    )
    extra: dict[str, Any] = {"focusing_factor": options.focusing_factor}
    if options.kernel_size:
        size = (options.heads * options.head_dim, 1, options.kernel_size, options.kernel_size)
        extra |= {"conv_weight": torch.randn(size, generator=generator).to(device, dtype)}
        extra |= {"grid": most_square_grid(tokens)}
    upstream = torch.randn(query.shape, generator=generator).to(device, dtype)

    maps: dict[str, Any] = {}
    if options.feature_maps:
        for name in ("query_map", "key_map"):
            weight = torch.eye(options.head_dim) + 0.1 * torch.randn(
                options.heads, options.head_dim, options.head_dim, generator=generator
            )
            bias = torch.randn(options.heads, options.head_dim, generator=generator)
            maps[name] = tuple(
                x.to(device).requires_grad_(options.backward) for x in (weight, bias)
            )  # float32, learned

    def timed(
        forward: Callable[[], torch.Tensor], heads_first: bool, parameters: tuple[torch.Tensor, ...] = ()
    ) -> Callable[[], object]:
        if not options.backward:
            return torch.inference_mode()(forward)
        grad = upstream.transpose(1, 2) if heads_first else upstream
        return lambda: torch.autograd.grad(forward(), (query, key, value, *parameters), grad)

    def softmax() -> torch.Tensor:
        return F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))

    def linear(backend: str, maps: dict[str, Any] | None = None) -> Callable[[], torch.Tensor]:
        return lambda: focused_linear_attention(query, key, value, backend=backend, **extra, **(maps or {}))

    def windowed(backend: str) -> Callable[[], torch.Tensor]:
        window = WindowAttention(options.heads, options.window).to(device, dtype).requires_grad_(False)
        window.backend = backend
        run, grid = linear(backend), most_square_grid(tokens)
        return lambda: window(run(), query, key, value, grid, None, None)[0]

    found: dict[str, Callable[[], object]] = {}
    if not options.no_sdpa:
        found["sdpa"] = timed(softmax, heads_first=True)
        if device.type == "cuda":
            for name, kind in SDPA_BACKENDS.items():
                found[f"sdpa:{name}"] = sdpa_kernel(kind)(timed(softmax, heads_first=True))
    for backend in available_backends(device):
        if backend != "reference":
            found[f"linear:{backend}"] = timed(linear(backend), heads_first=False)
            if maps:
                learned = (*maps["query_map"], *maps["key_map"])
                found[f"linear:{backend}+maps"] = timed(linear(backend, maps), False, learned)
            if options.window:
                found[f"linear:{backend}+windows"] = timed(windowed(backend), heads_first=False)
    if device.type == "cuda" and not (options.no_public or options.backward):
        for name, forward in public_variants(query, key, value).items():
            found[name] = timed(forward, heads_first=False)
    if options.compile:
        found["linear:compiled"] = timed(torch.compile(linear("auto"), dynamic=False), heads_first=False)
    return found


def public_variants(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    """Triton linear attentions of other packages on the same tensors.

    None on the package index has this operation, attention over all tokens (looked at: fla-core 0.6.0 and
    lightning-attn 0.0.5, causal only; flash-bidirectional-linear-attention, which has it, is not on the index). The
    nearest, fla's chunked causal kernel, multiplies about as much; it runs on rectified query and key, without
    focused map and convolution.
    """
    name = "public:fla chunk (causal, no map)"
    try:
        linear: Any = importlib.import_module("fla.ops.linear_attn")
    except ImportError as error:
        reason = f"fla-core is not installed ({error})"

        def missing() -> torch.Tensor:
            raise RuntimeError(reason)

        return {name: missing}
    positive_query, positive_key = (F.relu(x) + 1e-6 for x in (query, key))
    return {name: lambda: linear.chunk_linear_attn(positive_query, positive_key, value, normalize=True)[0]}


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of one call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def measure(options: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Median seconds of every variant that runs, and the reason for each that does not."""
    device = torch.device(options.device)
    runnable: dict[str, Callable[[], object]] = {}
    failures: dict[str, str] = {}
    for name, function in variants(options, tokens).items():
        try:
            for _ in range(options.warmup):
                function()
            runnable[name] = captured(function) if options.graphs else function
        # A backend that does not take this shape, a package that is not there, or memory running out.
        except (RuntimeError, AssertionError, ValueError) as error:
            failures[name] = (str(error) or type(error).__name__).splitlines()[0]
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    runnable["copy"] = lambda: target.copy_(source)
    runnable["copy"]()
    times: dict[str, list[float]] = {name: [] for name in runnable}
    for _ in range(options.rounds):
        for name, function in runnable.items():
            times[name].append(seconds_of(function, device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    bandwidth = 2 * COPY_BYTES / medians.pop("copy")
    moved = 4 * options.batch * tokens * options.heads * options.head_dim * DTYPES[options.dtype].itemsize
    softmax = min((value for name, value in medians.items() if name.startswith("sdpa")), default=None)
    rows = {
        name: {
            "seconds": median,
            "fastest_seconds": min(times[name]),
            "ratio_to_sdpa": softmax / median if softmax else None,
            "ratio_to_bytes": None if options.backward else moved / bandwidth / median,
        }
        for name, median in medians.items()
    }
    return {"tokens": tokens, "copy_bytes_per_second": bandwidth, "variants": rows, "failures": failures}


def header(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    return settings | {
        "torch": torch.__version__,
        "cpu": device_name(torch.device("cpu")),
        "gpu": device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'tokens':>8} {'variant':<18} {'ms':>10} {'x SDPA':>8} {'of copy':>8}"]
    for row in rows:
        for name, found in row["variants"].items():
            ratio = "-" if found["ratio_to_sdpa"] is None else f"{found['ratio_to_sdpa']:.2f}"
            share = "-" if found["ratio_to_bytes"] is None else f"{found['ratio_to_bytes']:.0%}"
            lines.append(f"{row['tokens']:>8} {name:<18} {found['seconds'] * 1e3:>10.3f} {ratio:>8} {share:>8}")
        lines += [f"{row['tokens']:>8} {name:<18} {reason}" for name, reason in row["failures"].items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    about = header(options)
    print(f"torch {about['torch']} | {about['gpu'] or about['cpu']} | {about['threads']} threads | {about['date']}")
    print(
        f"B={options.batch} H={options.heads} D={options.head_dim} {options.dtype} "
        f"kernel {options.kernel_size} {'forward+backward' if options.backward else 'forward'}"
    )
    rows = [measure(options, tokens) for tokens in options.tokens]
    print(table(rows))
    if options.json:
        write_json(options.json, {"header": about, "results": rows})


if __name__ == "__main__":
    main()
