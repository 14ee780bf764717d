"""docs/compatibility.md from the marks on tests: `python -m tests.compatibility` from the checkout's root.

A test says what it proves: `@pytest.mark.compatibility("LoRA", "works", "load it before or after")`. The command runs
every marked test and writes the page only where each row has a test that ran and none that failed;
`test_compatibility.py` fails while page and marks differ.
"""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
MARK = "compatibility"
STATUSES = ("works", "order matters", "refused")
NOT_TESTED = "not tested here"
UNTESTED = {
    "torchao": "not in constraints.txt",
    "bitsandbytes": "not in constraints.txt",
    "gguf": "not in constraints.txt",
    "cache-dit": "not in constraints.txt",
    "DeepCache": "not in constraints.txt",
    "ONNX files": "onnxscript is not in constraints.txt; the exported program behind them is tested, see torch.export",
    "DeepSpeed": "not in constraints.txt",
}
"""What the environment of the tests lacks: feature -> remark."""


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        feature: what stands beside a conversion.
        status: out of `STATUSES`.
        remark: one line.
        test: path of the test's file from the root, and its function.
    """

    feature: str
    status: str
    remark: str
    test: str


def rows() -> list[Row]:
    """Every mark on a test, read from the source: what a machine lacks does not matter. Raises ValueError for a mark
    that does not say three strings, or an unknown status."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == f"pytest.mark.{MARK}":
                    words = [ast.literal_eval(argument) for argument in decorator.args]
                    if len(words) != 3 or not all(isinstance(word, str) for word in words) or words[1] not in STATUSES:
                        raise ValueError(f"{path}:{decorator.lineno}: say feature, one of {STATUSES}, and a remark.")
                    found.append(Row(*words, f"{path.relative_to(ROOT).as_posix()}::{node.name}"))
    return sorted(found, key=lambda row: (row.feature.lower(), STATUSES.index(row.status), row.remark, row.test))


def page() -> str:
    """The page as it ought to be."""
    lines = [
        "# What works beside it",
        "",
        "Made from marks on tests by `python -m tests.compatibility`, which runs them first; a test fails while this",
        "page says anything else. *Works*: as the remark says, or in any order. *Order matters*: the remark says how.",
        "*Refused*: an error, and nothing is changed. All on tiny random models of the real classes, on a CPU.",
        "",
        "| | status | | test |",
        "|---|---|---|---|",
    ]
    for row in rows():
        path, name = row.test.split("::")
        lines.append(f"| {row.feature} | {row.status} | {row.remark} | [{name}](../{path}) |")
    lines += [f"| {feature} | {NOT_TESTED} | {remark} | |" for feature, remark in UNTESTED.items()]
    return "\n".join(lines) + "\n"


class _Outcomes:
    """A plugin that keeps how marked tests ended: test -> the outcomes of its cases."""

    def __init__(self) -> None:
        self.of: dict[str, set[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.of.setdefault(report.nodeid.split("[")[0], set()).add(report.outcome)


def main() -> int:
    """Run the marked tests, then write the page; 1 where a row is not proven."""
    os.chdir(ROOT)
    outcomes, wanted = _Outcomes(), rows()
    # No workers: they would report to another process.
    pytest.main(["-n", "0", "-m", MARK, *sorted({row.test for row in wanted})], plugins=[outcomes])
    unproven = [row for row in wanted if "passed" not in outcomes.of.get(row.test, set())]
    failed = [row for row in wanted if "failed" in outcomes.of.get(row.test, set())]
    for row in dict.fromkeys([*unproven, *failed]):
        print(f"{row.feature}: {row.test} did not pass here ({', '.join(outcomes.of.get(row.test, ['not run']))}).")
    if unproven or failed:
        print(f"{PAGE} is left as it was.")
        return 1
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(wanted)} rows from tests that passed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
