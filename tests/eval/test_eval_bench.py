"""The speed tables, in miniature: what is run and what is reported of it; no time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval.benchmarks import conversion, cpu
from eval.benchmarks.__main__ import main, parse_arguments
from flatten_diffusion import linearize
from flatten_diffusion.models import autotune as layers
from flatten_diffusion.models import timing as crossover
from flatten_eval.speed import architectures, operator

from .test_eval_throughput import TINY


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "ARCHITECTURES", TINY)
    monkeypatch.setattr(operator, "COPY_BYTES", 2**16)
    monkeypatch.setenv("FLATTEN_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(crossover, "_known", {})
    monkeypatch.setattr(layers, "_found", {})
    monkeypatch.setattr(crossover, "_time_ratio", lambda runs_at, side, device: 100 / (side * side))


def test_the_cpu_table(tmp_path: Path) -> None:
    path, threads = tmp_path / "cpu.json", torch.get_num_threads()
    try:
        main(
            ["cpu", "--json", str(path), "--threads", "1", "--tokens", "4096", "--rounds", "1", "--sizes", "64", "128",
             "--model_rounds", "2", "1", "--no_compile"]
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    result = json.loads(path.read_text())
    assert result["command"].startswith("python -m eval.benchmarks cpu --json ")
    assert {"versions", "device_name", "time", "threads", "load_before"} <= set(result["environment"])
    assert [(row["kernel_size"], row["tokens"]) for row in result["operator"]] == [(5, 4096), (0, 4096)]
    assert {"sdpa", "linear:eager"} == set(result["operator"][0]["variants"])
    assert [set(row["variants"]) for row in result["model"]] == [{"sdpa", "linear:eager", "floor"}] * 2
    assert [row["variants"]["linear:eager"]["rounds"] for row in result["model"]] == [2, 1]
    assert all("tokens (measured)" in reason for reason in result["model"][0]["layers"].values())
    assert [row["row"] for row in result["verdicts"]] == ["operator, 4096 tokens"]
    row = result["operator"][0]["variants"]
    assert result["verdicts"][0]["ratio"] == pytest.approx(row["sdpa"]["median"] / row["linear:eager"]["median"])


def test_rows_that_miss_are_said() -> None:
    result = {
        "operator": [],
        "bfloat16": [{"tokens": 16384, "float32_over_bfloat16": 0.9}],
        "model": [
            {"width": size, "height": size, "variants": {"linear:eager": {"speedup_over_sdpa": s, "ratio_to_floor": f}}}
            for size, s, f in ((512, 0.98, None), (1024, 1.4, 1 / 0.9))
        ],
    }
    met = {row["row"]: row["met"] for row in cpu.verdicts(result)}
    assert met == {
        "unet 1024x1024 against sdpa": False,
        "unet 1024x1024 against the floor": True,
        "unet 512x512 against sdpa": True,
        "bfloat16 against float32, 16384 tokens": False,
    }


def test_how_many_rounds_are_missing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["cpu", "--sizes", "64", "--model_rounds", "1", "2"])
    assert "1 in all" in capsys.readouterr().err


def test_conversion_of_every_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flux does not fit here: its weights stay on the meta device, and its new parameters count all the same."""
    path, built = tmp_path / "conversion.json", conversion.build_meta_model
    flux = conversion.tensor_bytes(built("flux", torch.bfloat16))
    monkeypatch.setattr(conversion, "free_memory", lambda _device: flux)
    monkeypatch.setattr(conversion, "SHARE", 1e9)  # of a model of a few hundred parameters
    main(["conversion", "--archs", "pixart", "flux", "--rounds", "2", "--json", str(path)])
    result = json.loads(path.read_text())
    assert {"versions", "device_name", "time", "threads", "load_before"} <= set(result["environment"])
    pixart, flux_row = result["conversion"]
    assert (pixart["weights"], pixart["layers"], len(pixart["seconds"])) == ("random", 1, 2)
    assert (flux_row["weights"], flux_row["layers"]) == ("meta", 2)
    for row in (pixart, flux_row):
        model = built(row["arch"], torch.bfloat16)
        own = conversion.tensor_bytes(model)
        adapter = linearize(model)
        assert row["model_bytes"] == own
        assert row["added_bytes"] == sum(2 * p.numel() for p in adapter.parameters()) > 0
        assert row["share"] == row["extra_bytes"] / own and row["met"]
    assert flux_row["extra_bytes"] == flux_row["added_bytes"] + (flux_row["peak_bytes"] or 0)


def test_training_memory_from_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, rank = tmp_path / "recipes.json", 4
    main(["recipes", "--archs", "pixart", "--rank", str(rank), "--window", "0", "--json", str(path)])
    (row,) = json.loads(path.read_text())["recipes"]
    model = conversion.build_meta_model("pixart", torch.bfloat16)
    assert row["model_bytes"] == conversion.tensor_bytes(model)
    adapter = linearize(model)
    factors = 0
    for _, attn in adapter.attention_modules():
        for linear in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]):
            factors += rank * (linear.in_features + linear.out_features) + linear.out_features  # and a bias
    mixers = sum(parameter.numel() for parameter in adapter.parameters())
    assert row["layers"] == len(adapter.layers) > 0 and row["learned"] == mixers + factors
    assert row["state_bytes"] == 5 * 4 * row["learned"] and "pixart" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("weights", "seconds", "added", "peak", "extra", "met"),
    [
        ("random", [1.0, 2.0], 10, 19, 19, True),
        ("random", [1.0, 10.5], 10, 19, 19, False),
        ("random", [1.0], 10, 20, 20, False),
        ("random", [1.0], 21, None, 21, False),
        ("meta", [1.0], 10, 9, 19, True),
        ("meta", [1.0], 10, 19, 29, False),
    ],
)
def test_a_conversion_that_misses_is_said(
    weights: str, seconds: list[float], added: int, peak: int | None, extra: int, met: bool
) -> None:
    found = conversion.judge(1000, weights, seconds, added, peak)
    assert found == {"extra_bytes": extra, "share": extra / 1000, "met": met}


@pytest.mark.parametrize("backward", [False, True])
def test_the_operator_with_feature_maps_and_windows(backward: bool) -> None:
    settings = operator.OperatorSettings(
        head_dim=8, kernel_size=0, feature_maps=True, window=4, backward=backward, softmax=False, all_backends=False
    )
    variants = operator.measure_operator(64, torch.device("cpu"), settings, rounds=1, warmup=1)["variants"]
    assert set(variants) == {f"linear:eager{end}" for end in ("", "+maps", "+windows")}
    assert all(found["failure"] is None and found["median"] > 0 for found in variants.values())
    candidates = operator.operator_candidates(64, torch.device("cpu"), settings)
    functions = {name: candidate.call for name, candidate in candidates.items()}
    mapped, plain, windowed = (functions[f"linear:eager{end}"]() for end in ("+maps", "", "+windows"))
    if backward:
        assert [gradient.shape for gradient in mapped[3:]] == [(8, 8, 8), (8, 8), (8, 8, 8), (8, 8)]
        assert not torch.equal(windowed[0], plain[0])
    else:
        assert mapped.shape == windowed.shape == plain.shape
        assert not torch.equal(mapped, plain) and not torch.equal(windowed, plain)


def test_other_packages_are_named_with_the_reason_they_are_missing() -> None:
    query = torch.randn(1, 8, 2, 4)
    (name, run), *others = operator.public_variants(query, query, query).items()
    assert name.startswith("public:") and not others
    with pytest.raises((RuntimeError, ImportError)):
        run()
