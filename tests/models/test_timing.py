"""The search and its cache, on machines made up here: nothing depends on how fast this one is."""

from __future__ import annotations

import json
import logging
import os
import threading

import pytest
import torch

from flatten_diffusion.models import timing
from flatten_diffusion.models.timing import UNMEASURED_TOKENS, Timings, find_crossover, known_timings, search

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLATTEN_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(timing, "_known", {})
    return tmp_path / "cache"


def machine(meets_at, overhead=0.0):
    """linear: overhead + tokens; softmax: tokens ** 2 / meets_at."""
    sizes = []

    def ratio_at(side):
        tokens = side * side
        sizes.append(tokens)
        return (overhead + tokens) / (tokens * tokens / meets_at)

    return ratio_at, sizes


@pytest.fixture
def timed(monkeypatch):
    """Counts timings; every kind meets at 1000 tokens."""
    ratio_at, sizes = machine(1000)
    monkeypatch.setattr(timing, "_time_ratio", lambda runs_at, side, device: ratio_at(side))
    return sizes


def forget():
    timing._known.clear()


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("meets_at", [50, 300, 700, 1000, 2500, 5000])
def test_finds_where_the_two_meet(meets_at):
    ratio_at, sizes = machine(meets_at)
    found = search(ratio_at, 60.0)
    with_margin = meets_at / 0.95
    assert with_margin <= found.tokens <= 1.4 * with_margin
    assert all(ratio <= 0.95 for tokens, ratio in found.ratios.items() if tokens >= found.tokens)
    assert any(ratio > 0.95 for ratio in found.ratios.values())
    assert len(sizes) <= 14 and max(sizes) < 8 * meets_at + 200  # nothing far beyond is run
    assert found.complete


def test_faster_everywhere_and_nowhere():
    assert search(machine(1)[0], 60.0).tokens == 0
    never = search(machine(10**6)[0], 60.0)
    assert never.complete and never.tokens == 10**6  # extrapolated: the ratio falls as 1 / tokens


def test_one_slow_size_in_between_moves_the_crossover_beyond_it():
    ratio_at, _ = machine(300)
    found = search(lambda side: 1.5 if side == 32 else ratio_at(side), 60.0)
    assert 32 * 32 < found.tokens <= 45 * 45


def test_out_of_time_is_said(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    found = search(machine(2000)[0], 3.5)
    assert not found.complete and len(found.ratios) == 4 and found.tokens == 2000


def test_ratio_between_the_sizes_timed():
    found = Timings(100, {64: 2.0, 256: 0.5})
    assert found.ratio_at(64) == pytest.approx(2.0) and found.ratio_at(256) == pytest.approx(0.5)
    assert found.ratio_at(128) == pytest.approx(1.0)
    assert found.ratio_at(63) is None and found.ratio_at(257) is None
    assert Timings(5, {}).ratio_at(64) is None and Timings(5, {16: 3.0}).ratio_at(16) == 3.0


# --- the cache --------------------------------------------------------------------------------------------------------


def test_timed_once_then_read_from_memory_and_from_disk(timed, folder):
    first = find_crossover("a", CPU, torch.float32, None)
    count = len(timed)
    assert count > 0 and 1000 < first.tokens < 1500
    assert find_crossover("a", CPU, torch.float32, None) is first
    forget()
    again = find_crossover("a", CPU, torch.float32, None)
    assert len(timed) == count and again.tokens == first.tokens
    assert again.ratios == pytest.approx(dict(first.ratios), 1e-3)
    assert [path.name for path in folder.iterdir()] == ["crossover.json"]  # no temporary file is left


def test_what_tells_entries_apart(timed, monkeypatch):
    keys = set()
    for change in ({}, {"kind": "b"}, {"dtype": torch.bfloat16}, {"torch": "9.9"}, {"package": "9.9"}, {"threads": 77},
                   {"name": "another"}):  # fmt: skip
        with monkeypatch.context() as patch:
            if "torch" in change:
                patch.setattr(torch, "__version__", "9.9")
            if "package" in change:
                patch.setattr(timing, "__version__", "9.9")
            if "threads" in change:
                patch.setattr(torch, "get_num_threads", lambda: 77)
            if "name" in change:
                patch.setattr(timing, "device_name", lambda device: "another")
            forget()
            before = len(timed)
            find_crossover(change.get("kind", "a"), CPU, change.get("dtype", torch.float32), None)
            assert len(timed) > before, change
    keys = json.loads(timing.cache_file().read_text())["crossovers"].keys()
    assert len(keys) == 7


def test_looking_up_times_nothing(timed):
    assert known_timings("a", CPU, torch.float32) is None
    assert timed == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 1}',
        '{"format": 9, "crossovers": {}}',
        '{"format": 1, "crossovers": {"x": 3}}',
        "\udc80",
    ],
)
def test_a_damaged_file_is_timed_again_and_replaced(timed, folder, content):
    folder.mkdir()
    (folder / "crossover.json").write_bytes(content.encode(errors="surrogateescape"))
    find_crossover("a", CPU, torch.float32, None)
    assert timed
    forget()
    assert known_timings("a", CPU, torch.float32) is not None


def test_one_bad_entry_leaves_the_others(timed, folder):
    find_crossover("a", CPU, torch.float32, None)
    find_crossover("b", CPU, torch.float32, None)
    path = folder / "crossover.json"
    content = json.loads(path.read_text())
    bad = next(key for key in content["crossovers"] if key.startswith("b"))
    content["crossovers"][bad] = {"tokens": "many"}
    path.write_text(json.dumps(content))
    forget()
    assert known_timings("a", CPU, torch.float32) is not None
    assert known_timings("b", CPU, torch.float32) is None


def test_where_the_file_is(monkeypatch, tmp_path):
    assert timing.cache_file().parent == tmp_path / "cache"
    monkeypatch.delenv("FLATTEN_DIFFUSION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert timing.cache_file() == tmp_path / "xdg" / "flatten_diffusion" / "crossover.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert timing.cache_file() == tmp_path / "home" / ".cache" / "flatten_diffusion" / "crossover.json"


def test_a_folder_that_cannot_be_written_only_costs_timing_again(timed, folder, caplog):
    folder.write_text("a file in the folder's place")
    with caplog.at_level(logging.WARNING):
        assert find_crossover("a", CPU, torch.float32, None).tokens > 1000
    assert "FLATTEN_DIFFUSION_CACHE" in caplog.text and "\n" not in caplog.records[0].getMessage()


def test_an_interrupted_write_leaves_the_earlier_file(timed, folder, monkeypatch):
    find_crossover("a", CPU, torch.float32, None)
    before = (folder / "crossover.json").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    find_crossover("b", CPU, torch.float32, None)
    assert (folder / "crossover.json").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["crossover.json"]


def test_a_search_out_of_time_is_not_kept(monkeypatch, folder):
    monkeypatch.setattr(timing, "search", lambda ratio_at, seconds: Timings(123, {16: 2.0}, complete=False))
    assert find_crossover("a", CPU, torch.float32, None).tokens == 123
    assert not (folder / "crossover.json").exists()


def test_what_cannot_be_timed_gets_a_guess_that_is_not_kept(monkeypatch, folder, caplog):
    def fails(runs_at, side, device):
        raise RuntimeError("no kernel image is available\nsecond line")

    monkeypatch.setattr(timing, "_time_ratio", fails)
    with caplog.at_level(logging.WARNING):
        assert find_crossover("a", CPU, torch.float32, None) == Timings(UNMEASURED_TOKENS, {})
    assert "no kernel image" in caplog.text and "second line" not in caplog.text
    assert find_crossover("a", torch.device("meta"), torch.float32, None).tokens == UNMEASURED_TOKENS
    assert not folder.exists()


def test_fake_tensors_are_not_timed(timed):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert find_crossover("a", CPU, torch.float32, None).tokens == UNMEASURED_TOKENS
    assert timed == []


def test_threads_time_once(timed):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(find_crossover("a", CPU, torch.float32, None))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len(timed) == len(set(timed))


# --- the real timing --------------------------------------------------------------------------------------------------


def test_timing_runs_both_in_turn_without_gradients(monkeypatch):
    monkeypatch.setattr(timing, "_SECONDS_PER_SIZE", 0.0)
    calls = []

    def runs_at(side):
        def run(name):
            calls.append(name)
            assert torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")

        return lambda: run(f"linear{side}"), lambda: run(f"softmax{side}")

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert timing._time_ratio(runs_at, 3, CPU) > 0
    assert calls == ["linear3", "softmax3"] * 7  # two to warm up, five timed
