"""The throughput command. Nothing here asserts a time: only what was run, and what is reported of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flatten_eval.speed import architectures, operator
from flatten_eval.speed import model as throughput
from flatten_eval.speed.architectures import ARCHITECTURES, Architecture, build_model, make_inputs
from flatten_eval.speed.floor import attention_free
from flatten_eval.speed.timing import Candidate, Measurement, describe_failure, measure

Run = Callable[..., dict[str, Any]]
Fail = Callable[..., tuple[int, str]]
CPU = torch.device("cpu")

_DIT = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 1,
    "patch_size": 2, "sample_size": 8, "norm_elementwise_affine": False,
}  # fmt: skip
TINY = {
    "sd15": Architecture(
        "UNet2DConditionModel",
        {
            "sample_size": 8, "layers_per_block": 1, "norm_num_groups": 8, "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 24, "attention_head_dim": 2,
        },
        10,
    ),
    "dit": Architecture("DiTTransformer2DModel", _DIT | {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 1000}, 5),
    "pixart": Architecture(
        "PixArtTransformer2DModel",
        _DIT | {
            "cross_attention_dim": 16, "caption_channels": 12, "norm_type": "ada_norm_single",
            "use_additional_conditions": False,
        },
        5,
    ),
    "sd3": Architecture(
        "SD3Transformer2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1,
            "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12,
            "caption_projection_dim": 16, "pooled_projection_dim": 12, "pos_embed_max_size": 16,
        },
        5,
    ),
    "flux": Architecture(
        "FluxTransformer2DModel",
        {
            "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 12,
            "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
        },
        5,
        guidance_batches=1,
    ),
}  # fmt: skip


@pytest.fixture
def tiny_archs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "ARCHITECTURES", TINY)
    monkeypatch.setattr("flatten_eval.commands.throughput.ARCHITECTURES", TINY)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("sd15", 859_520_964), ("sd21", 865_910_724), ("sdxl", 2_567_463_684), ("flux", 11_901_408_320)],
)
def test_full_size_architectures_have_the_published_parameter_counts(name: str, parameters: int) -> None:
    import diffusers

    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        model = getattr(diffusers, architecture.model)(**architecture.config)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_architecture_runs_on_its_inputs(tiny_archs: None, name: str, dtype: torch.dtype) -> None:
    model = build_model(name, CPU, dtype)
    height, width = (64, 64) if name == "dit" else (64, 96)
    with torch.inference_mode():
        found = model(**make_inputs(model, height, width, 2, seed=0), return_dict=False)[0]
    assert found.dtype == dtype and len(found) == 2 and torch.isfinite(found).all()


def test_the_floor_differs_only_by_the_product_and_leaves_no_trace(tiny_archs: None) -> None:
    from flatten_diffusion import linearize, restore

    torch.manual_seed(0)
    model = build_model("sd15", CPU, torch.float32)
    inputs = make_inputs(model, 64, 96, 2, seed=0)
    with torch.inference_mode():
        before = model(**inputs, return_dict=False)[0]
        adapter = linearize(model)
        linear = model(**inputs, return_dict=False)[0]
        values: list[torch.Tensor] = []
        with attention_free(adapter):
            # Handing on the values is attention with one token per query: checked on the first converted layer.
            _, attention = next(iter(adapter.attention_modules()))
            hook = attention.to_v.register_forward_hook(lambda _m, _i, out: values.append(out.clone()))
            out_hook = attention.to_out[0].register_forward_pre_hook(lambda _m, args: values.append(args[0].clone()))
            floor = model(**inputs, return_dict=False)[0]
            hook.remove()
            out_hook.remove()
        assert torch.equal(values[0], values[1])
        assert torch.equal(model(**inputs, return_dict=False)[0], linear)
        assert not torch.equal(floor, linear) and not torch.equal(floor, before)
        restore(model)
        assert torch.equal(model(**inputs, return_dict=False)[0], before)


def test_a_run_reports_every_variant_and_the_crossover(
    tiny_archs: None, run_json: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_json(
        "throughput", "--arch", "sd15", "--sizes", "64", "96x64", "--rounds", 2, "--plot", tmp_path / "p.png"
    )
    assert [(row["width"], row["height"]) for row in found["sizes"]] == [(64, 64), (96, 64)]
    for row in found["sizes"]:
        variants = row["variants"]
        assert set(variants) == {"sdpa", "sdpa:flash", "sdpa:math", "linear:eager", "linear:reference", "floor"}
        for name, variant in variants.items():
            assert variant["failure"] is None and variant["rounds"] == 2, name
            assert variant["low"] <= variant["median"] <= variant["high"]
            assert variant["seconds_per_image"] == pytest.approx(10 * variant["seconds_per_step"])
            assert variant["peak_bytes"] is None or variant["peak_bytes"] > 2**20
        assert variants["sdpa"]["speedup_over_sdpa"] == 1 and variants["floor"]["ratio_to_floor"] == 1
    assert "verdict" in found["crossover"]["eager"]
    with Image.open(tmp_path / "p.png") as image:
        assert image.size[0] > 300
    assert "crossover (eager): " in capsys.readouterr().out


def test_a_model_that_cannot_be_converted_says_why(tiny_archs: None, run_json: Run) -> None:
    from flatten_diffusion import linearize

    model = build_model("flux", CPU, torch.float32)
    try:
        linearize(model)
    except ValueError as error:
        variants = run_json("throughput", "--arch", "flux", "--sizes", "64", "--rounds", 1)["sizes"][0]["variants"]
        assert variants["linear"]["failure"] == variants["floor"]["failure"] == str(error).splitlines()[0]
        assert variants["sdpa"]["median"] > 0
    else:
        pytest.skip("every family converts by now")


def test_the_denoiser_of_a_pipeline_with_its_adapter(tiny_pipeline: Path, tiny_adapter: Path, run_json: Run) -> None:
    found = run_json(
        "throughput", "--pipeline", tiny_pipeline, "--adapter", tiny_adapter, "--sizes", "32", "--rounds", 1, "--fewer"
    )
    assert set(found["sizes"][0]["variants"]) == {"sdpa", "linear:eager", "floor"}


def test_compiled_variants(tiny_archs: None) -> None:
    """With the compiler's own tracing, without its code generation: seconds instead of minutes."""
    model = build_model("sd15", CPU, torch.float32)
    compile_model = torch.compile
    options = throughput.ThroughputOptions(rounds=1, warmup=1, compiled=True, all_backends=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda m, **options: compile_model(m, backend="aot_eager", **options))
        row = throughput.measure_model(model, [(32, 32)], CPU, options)[0]
    compiled = {name: row["variants"][name] for name in row["variants"] if name.endswith("(compiled)")}
    assert set(compiled) == {"sdpa (compiled)", "linear (compiled)", "floor (compiled)"}
    assert all(variant["failure"] is None for variant in compiled.values()), compiled


def test_out_of_memory_is_a_result() -> None:
    def exhausted() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    calls: list[str] = []

    def second_time() -> None:
        calls.append("x")
        if len(calls) > 3:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    found = measure(
        {"first": Candidate(exhausted), "later": Candidate(second_time), "fine": Candidate(lambda: None)},
        CPU, rounds=3, warmup=1, seconds=60, label="test",
    )  # fmt: skip
    assert found["first"].failure == found["later"].failure == "out of memory"
    assert found["fine"].failure is None and len(found["fine"].samples) == 3
    assert describe_failure(RuntimeError("mat1 and mat2\nmore")) == "RuntimeError: mat1 and mat2"


def test_rounds_are_interleaved_in_a_rotating_order_inside_their_context() -> None:
    order: list[str] = []
    inside: list[str] = []

    class Context:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            inside.append(self.name)

        def __exit__(self, *_: object) -> None:
            inside.pop()

    def call(name: str) -> Candidate:
        return Candidate(lambda: order.append(name + inside[-1]), lambda: Context(name))

    measure({"a": call("a"), "b": call("b")}, CPU, rounds=2, warmup=0, seconds=60, label="t")
    assert order == ["aa", "bb", "aa", "bb", "bb", "aa"]  # peaks, then two rounds
    order.clear()
    assert measure({"a": call("a")}, CPU, rounds=9, warmup=0, seconds=-1, label="t")["a"].as_dict()["rounds"] == 1


@pytest.mark.parametrize(
    ("speeds", "verdict", "pixels"),
    [
        ([0.5, 0.5, 2.0], "faster from about", round((512 * 1024) ** 0.5)),
        ([1.5, 2.0, 3.0], "faster at every measured size", None),
        ([0.2, 0.3, 0.4], "slower at every measured size", None),
        ([None, None, None], "no size at which both ran", None),
        ([2.0, 0.5, 0.5], "faster only at the smaller sizes", None),
    ],
)
def test_crossover(speeds: list[float | None], verdict: str, pixels: int | None) -> None:
    rows = [
        {"height": side, "width": side, "variants": {"linear:eager": {"speedup_over_sdpa": speed}, "sdpa": {}}}
        for side, speed in zip((256, 512, 1024), speeds, strict=True)
    ]
    found = throughput.crossover(rows)
    assert found["verdict"].startswith(verdict)
    assert found["pixels"] == pixels


def test_the_operator_alone(run_json: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "COPY_BYTES", 2**20)
    found = run_json(
        "throughput", "--op", "--tokens", 24, 35, "--heads", 2, "--head-dim", 8, "--rounds", 2, "--dtype", "bfloat16"
    )
    assert found["copy_bytes_per_second"] > 0
    for row, tokens in zip(found["tokens"], (24, 35), strict=True):
        assert row["tokens"] == tokens and row["bytes_moved"] == 4 * tokens * 2 * 8 * 2
        variant = row["variants"]["linear:eager"]
        share = row["bytes_moved"] / variant["median"] / row["copy_bytes_per_second"]
        assert variant["of_copy_bandwidth"] == pytest.approx(share)


def test_every_option_of_the_operator(run_json: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "COPY_BYTES", 2**16)
    found = run_json(
        "throughput", "--op", "--tokens", 16, "--heads", 2, "--head-dim", 8, "--rounds", 1, "--fewer", "--no-sdpa",
        "--feature-maps", "--window", 2, "--kernel-size", 0, "--backward", "--focusing-factor", 2,
    )  # fmt: skip
    variants = found["tokens"][0]["variants"]
    assert set(variants) == {f"linear:eager{end}" for end in ("", "+maps", "+windows")}
    assert all(row["failure"] is None and row["of_copy_bandwidth"] is None for row in variants.values())
    assert (found["backward"], found["window"], found["focusing_factor"]) == (True, 2, 2.0)


def test_a_measured_crossover_tells_what_became_of_each_layer(
    tiny_archs: None, run_json: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLATTEN_DIFFUSION_CACHE", str(tmp_path))
    monkeypatch.setattr("flatten_diffusion.models.timing._time_ratio", lambda runs_at, side, device: 100 / side**2)
    found = run_json("throughput", "--arch", "sd15", "--sizes", 64, "--rounds", 1, "--fewer", "--min-tokens", "auto")
    assert found["min_tokens"] == "auto" and all("measured" in why for why in found["sizes"][0]["layers"].values())


def test_wrong_use_is_one_line(tiny_archs: None, tmp_path: Path, run_error: Fail, monkeypatch: Any) -> None:
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--arch", "sd15", "--adapter", "x"), "--adapter belongs to --pipeline"),
        (("--arch", "sd15", "--kernel-size", 4), "needs an odd number"),
        (("--op", "--plot", "x.png"), "does not go with --op"),
        (("--op", "--graphs"), "--graphs needs a CUDA device"),
        (("--arch", "sd15", "--sizes", "68"), "UNet2DConditionModel needs multiples of 16 pixels"),
        (("--pipeline", tmp_path), "no model_index.json"),
    ]
    for arguments, message in cases:
        code, line = run_error("throughput", *arguments)
        assert code == 2 and message in line, (arguments, line)
    monkeypatch.setattr(architectures, "free_memory", lambda _device: 1000)
    code, line = run_error("throughput", "--arch", "sd15")
    assert code == 2 and "its weights need" in line


def test_measurements_are_json_ready() -> None:
    assert json.loads(json.dumps(Measurement(failure="out of memory").as_dict()))["failure"] == "out of memory"
