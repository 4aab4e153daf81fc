"""Which task to start next, so that no worker idles and no fit is cut off by the limit of a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

MARGIN_SEEN = 1.25  # over the longest time that the same fit took in this campaign
MARGIN_TOLD = 1.5  # over a time of the results page, which another machine or another load gave
UNKNOWN = 400.0  # seconds, of a fit that nobody has timed
JUDGING = 15.0  # seconds beside the fit


class Task(NamedTuple):
    """One measurement; `held_out`: fitted on nine tenths."""

    catalogue: str
    levels: int
    kind: str
    seed: int
    held_out: bool = False


def times(rows: Iterable[dict[str, Any]], page: Path) -> Callable[[Task], float]:
    """Expected seconds of a task: from its rows, a results page, or a guess on the safe side."""
    seen: dict[tuple[str, int, str], list[float]] = {}
    for row in rows:
        seen.setdefault((row["catalogue"], row["levels"], row["kind"]), []).append(row["seconds"])
    told = fit_seconds(page.read_text()) if page.exists() else {}

    def expected(task: Task) -> float:
        key = task.catalogue, task.levels, task.kind
        if key in seen:
            return MARGIN_SEEN * max(seen[key])
        like = (
            [told[key]] if key in told else [value for (_, _, kind), value in told.items() if kind == key[2]]
        )
        return JUDGING + (MARGIN_TOLD * max(like) if like else UNKNOWN)

    return expected


def fit_seconds(page: str) -> dict[tuple[str, int, str], float]:
    """Fit seconds by (catalogue, levels, kind) from the tables of a results page."""
    found, place = {}, ("", 0)
    for line in page.splitlines():
        if heading := re.match(r"## (\S+), (\d) x \d+", line):
            place = heading[1], int(heading[2])
        elif line.startswith("## "):
            place = "", 0
        elif place[1] and re.match(r"\| .*\| [\d.]+ \|$", line):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found[(*place, cells[0])] = float(cells[-1])
    return found


def next_task(tasks: list[Task], expected: Callable[[Task], float], left: float) -> Task | None:
    """The longest task of the earliest seed that ends in the seconds left; None where none does."""
    fitting = [task for task in tasks if expected(task) <= left]
    return min(fitting, key=lambda task: (task.held_out, task.seed, -expected(task)), default=None)
