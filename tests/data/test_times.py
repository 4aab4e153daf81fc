"""Times on the command line: epoch seconds or dates, in UTC, never milliseconds."""

from __future__ import annotations

import pytest

from prerank_cli.times import parse_time
from prerank_tools.errors import UsageError


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("1318291200", 1_318_291_200),
        ("2011-10-11", 1_318_291_200),
        ("2011-10-11T01:00", 1_318_294_800),
        ("2011-10-11T01:00:00Z", 1_318_294_800),
        ("2011-10-11T01:00:00+01:00", 1_318_291_200),
        ("-5", -5),
    ],
)
def test_a_time_is_epoch_seconds_or_a_date(text: str, time: int) -> None:
    assert parse_time(text) == time


@pytest.mark.parametrize("text", ["1318291200000", "yesterday", "2011-13-01", ""])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_time(text)
    assert caught.value.hint
