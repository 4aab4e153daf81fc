"""The page of `pretrain_fashion.py`: retrieval step by step, and neighbours of the same article type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pretrain_data import interval, machine

METRICS = ("acc@1", "acc@5", "recall@10")
WAYS = [f"{way} {metric}" for way in ("i2t", "t2i") for metric in METRICS]
LADDER = ("in-batch only", "+ bank", "+ bank + triplet (mined)")
STEPS = [f"{name} @128" for name in LADDER] + [f"{name} @32" for name in LADDER[:2]]
WHOLE = "whole items @128"
SIMPLE = (
    "frozen",
    "linear map",
    "halves",
    "halves bare",
    "weighted",
    "weighted bare",
    "expected",
    "expected bare",
)
NEEDED = (*SIMPLE, *STEPS[:2], "bare", WHOLE, "whole bare")
NAMES = (*NEEDED, *STEPS[2:])
PAIRED = (
    (STEPS[0], "linear map"),
    (STEPS[1], STEPS[0]),
    (STEPS[2], STEPS[1]),
    (STEPS[4], STEPS[3]),
    (WHOLE, STEPS[1]),
)


@dataclass(frozen=True)
class World:
    """A column of the table of neighbours: which runs, and which of their measures."""

    halves: str
    weighted: str
    expected: str
    before: str
    whole: str
    late: str = ""


WORLDS = (
    World("halves", "weighted", "expected", STEPS[1], WHOLE),
    World("halves bare", "weighted bare", "expected bare", "bare", "whole bare"),
    World("halves bare", "weighted", "expected", STEPS[1], WHOLE, "late "),
)


def finished(runs: Mapping[str, Any], seeds: int) -> set[str]:
    """Names that were run with every seed."""
    return {name for name in NAMES if all(f"{name}|{seed}" in runs for seed in range(seeds))}


def page(runs: Mapping[str, Any], seeds: int, items: int, threads: int) -> str:
    """The results as Markdown."""
    figures = Figures(runs, seeds)
    head = f"| | {' | '.join(f'{way} {m}' for way in ('i2t', 't2i') for m in ('Acc@1', 'Acc@5', 'R@10'))} |"
    return "\n".join(
        [
            "# SCL on fashion: picture <-> title, and neighbours of the same type",
            "",
            f"`python benchmarks/pretrain_fashion.py --data DIR --cache F --out FILE --seeds {seeds}`",
            "",
            f"{machine(threads)}. Other work shared the cores; no timing is claimed here.",
            "",
            f"{items} illustrated items, split by title group: 500 groups held out (one item of each is",
            f"a candidate), {seeds} seeds (each its own split, initial weights and batch order). Towers",
            "frozen; a fusion of 128 dims learns. Mean ± half width of the 95 % t-interval over",
            "seeds; differences are paired by seed. `@32`, `@128`: batch size. i2t ranks the 500 titles for",
            "a picture, t2i the 500 pictures for a title. `frozen` is the untrained fusion: two unrelated",
            "spaces, hence chance. `whole items`: + bank with the three additions told below (ours).",
            "",
            head,
            "|---" * 7 + "|",
            *(figures.line(name) for name in ("frozen", "linear map", *STEPS, WHOLE) if name in figures.done),
            "",
            "Step by step, paired:",
            "",
            head,
            "|---" * 7 + "|",
            *(figures.step(one, other) for one, other in PAIRED if {one, other} <= figures.done),
            "",
            "kNN@10 of the article type among the items of held-out groups (unseen in pre-training), in",
            "three catalogues: titles as they are; no title has the words of its type, in training neither;",
            "and titles as they are in training, while those of the unseen items lack the words.",
            "",
            "| | titles | no type words at all | no type words in unseen items |",
            "|---|---|---|---|",
            *figures.kinds(),
            "",
        ]
    )


@dataclass(frozen=True)
class Figures:
    """Lines of the tables, from the runs."""

    runs: Mapping[str, Any]
    seeds: int

    @property
    def done(self) -> set[str]:
        """Names that were run with every seed."""
        return finished(self.runs, self.seeds)

    def of(self, name: str, key: str) -> np.ndarray:
        """One measure of one name, a value a seed."""
        return np.array([self.runs[f"{name}|{seed}"][key] for seed in range(self.seeds)])

    def line(self, name: str) -> str:
        """Retrieval of one name."""
        return row(name, [self.of(name, key) for key in WAYS])

    def step(self, one: str, other: str) -> str:
        """What `one` adds to `other`."""
        return row(f"{one} - {other}", [self.of(one, key) - self.of(other, key) for key in WAYS])

    def kinds(self) -> list[str]:
        """Neighbours of the same type: each vector, then what the fused ones add."""
        columns = [self.vectors(world) for world in WORLDS]
        found = [row(name, [column[name] for column in columns]) for name in columns[0]]
        before, whole = "both, SCL", "both, whole items"
        fused = (before, whole, "both, frozen, concatenated", "both, frozen, text weighted")
        mapped = "title, ridge to the expected picture"
        frozen = ("MiniLM title, frozen", "EfficientNet-Lite0 picture, frozen")
        six = [name for name in columns[0] if name not in fused and name != mapped]
        four = [name for name in six if "whole" not in name]
        for name, rival, names in (
            ("both, frozen, text weighted", "better frozen half", frozen),
            (before, "best of the four single ones without `whole items`", four),
            (whole, "better frozen half", frozen),
            (whole, "best of the six single ones", six),
            (whole, "picture, whole items", ["picture, whole items"]),
            (whole, mapped, [mapped]),
            (whole, "both, frozen, text weighted", ["both, frozen, text weighted"]),
            (whole, before, [before]),
        ):
            gains = [column[name] - np.max([column[one] for one in names], axis=0) for column in columns]
            found.append(row(f"{name} - {rival}", gains))
        return found

    def vectors(self, world: World) -> dict[str, np.ndarray]:
        """kNN@10 by vector in one catalogue."""
        late = world.late
        return {
            "MiniLM title, frozen": self.of(world.halves, "text"),
            "EfficientNet-Lite0 picture, frozen": self.of(world.halves, "image"),
            "title, ridge to the expected picture": self.of(world.expected, f"{late}knn"),
            "title, SCL": self.of(world.before, f"{late}knn text"),
            "picture, SCL": self.of(world.before, f"{late}knn image"),
            "title, whole items": self.of(world.whole, f"{late}knn text"),
            "picture, whole items": self.of(world.whole, f"{late}knn image"),
            "both, frozen, concatenated": self.of(world.halves, "concat"),
            "both, frozen, text weighted": self.of(world.weighted, f"{late}knn"),
            "both, SCL": self.of(world.before, f"{late}knn"),
            "both, whole items": self.of(world.whole, f"{late}knn"),
        }


def row(label: str, values: Sequence[np.ndarray]) -> str:
    """A line of a table."""
    return f"| {label} | {' | '.join(interval(list(v)) for v in values)} |"
