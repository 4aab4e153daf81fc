"""Times on the command line: epoch seconds or an ISO date."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from prerank_tools.errors import UsageError

LATEST_SECOND = 100_000_000_000


def parse_time(text: str) -> int:
    """Epoch seconds of `1318291200`, `2011-10-11` or `2011-10-11T12:00` (UTC unless it says otherwise)."""
    try:
        time = int(text)
    except ValueError:
        return _from_iso(text)
    if abs(time) > LATEST_SECOND:
        raise UsageError(f"{text}: not epoch seconds", f"milliseconds? {time // 1000}")
    return time


def _from_iso(text: str) -> int:
    try:
        date = datetime.fromisoformat(text)
    except ValueError as fault:
        raise UsageError(
            f"`{text}` is not a time", "write epoch seconds, or a date: 2011-10-11 or 2011-10-11T12:00"
        ) from fault
    return int((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp())


def time_option(*names: str, help: str) -> Any:
    """A Typer option that takes a time."""
    return typer.Option(*names, parser=parse_time, metavar="TIME", help=help)


Until = Annotated[int | None, time_option("--until", help="Use nothing from this time on.")]
