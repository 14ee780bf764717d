"""The page says what the marks say."""

from __future__ import annotations

from . import compatibility


def test_the_page_is_what_the_marks_make() -> None:
    written = compatibility.PAGE.read_text(encoding="utf-8")
    assert written == compatibility.page(), "run python -m tests.compatibility from the checkout's root"


def test_a_feature_says_each_thing_once() -> None:
    found = [(row.feature, row.status, row.remark) for row in compatibility.rows()]
    assert len(found) == len(set(found))
    assert not {feature for feature, _, _ in found} & set(compatibility.UNTESTED)
    assert all("|" not in word and "\n" not in word for row in compatibility.rows() for word in row)
