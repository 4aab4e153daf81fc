"""`train quantizer`: item embeddings in, a codebook folder out, for `quantize sid --codebook`."""

# N items, D dims, L levels
from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from prerank_tools.errors import ContractError, UsageError
from prerank_tools.quantizers.codebook import Codebook, Quantizer, load_codebook, quantizer_class
from prerank_tools.quantizers.fit_stage import KNOBS, SidConfig, fit_codebook, known_items, sample_vectors
from prerank_tools.quantizers.fsq import FSQConfig, RKMeansFSQ
from prerank_tools.quantizers.residuals import comparable
from prerank_tools.quantizers.rkmeans_plus import RKMeansPlus, RKMeansPlusConfig
from prerank_tools.quantizers.rqvae import RQVAE
from prerank_tools.quantizers.rqvae_net import RQVAEConfig
from prerank_tools.quantizers.sid_metrics import Reconstruction, SidCounts
from prerank_tools.quantizers.verdict import judge
from prerank_tools.stage import Context, Stage
from prerank_tools.tables.table import Table
from prerank_tools.training.board import check_board, with_board

Kind = Literal["rkmeans", "balanced-rkmeans", "pq", "random-hash", "rqvae", "rkmeans-plus", "rkmeans-fsq"]
LEARNED: dict[str, Any] = {"rqvae": RQVAEConfig, "rkmeans-plus": RKMeansPlusConfig, "rkmeans-fsq": FSQConfig}
QUALITY_ROWS = 200_000  # vectors that the quality numbers of a fit are measured on


class TrainQuantizerConfig(SidConfig):
    """Knobs of `[train.quantizer]`: those of `quantize sid`, the learned kinds, and their `network`.

    `network` holds the keys of RQVAEConfig (rqvae, rkmeans-plus) or FSQConfig (rkmeans-fsq), `network.train`
    how long and how fast; level sizes come from `levels` and `codes` whatever the kind.
    """

    quantizer: Kind = "rkmeans"  # type: ignore[assignment]
    network: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known_keys(self) -> Self:
        if self.quantizer in LEARNED:
            ignored = self.model_fields_set & (KNOBS | {"iterations"})
            if ignored:
                raise ValueError(f"{self.quantizer} has no key {min(ignored)}")
            LEARNED[self.quantizer](**self.network)
        elif self.network:
            raise ValueError(f"{self.quantizer} has no network")
        return self


@dataclass(frozen=True)
class TrainQuantizer(Stage):
    """Fit a codebook of any kind; with `until`, on items with an event before it."""

    name: ClassVar[str] = "train.quantizer"
    kind: ClassVar[str] = "model"

    embeddings: Path
    events: Path | None = None
    until: int | None = None
    init_from: Path | None = None
    config: TrainQuantizerConfig = field(default_factory=lambda: TrainQuantizerConfig())
    tensorboard: Path | None = None  # where to draw curves

    def inputs(self) -> Mapping[str, tuple[Path, str]]:
        found = {"embeddings": (self.embeddings, "item_embeddings")}
        more = {"events": (self.events, "events"), "init_from": (self.init_from, "")}
        return found | {role: (path, contract) for role, (path, contract) in more.items() if path}

    def params(self) -> Mapping[str, Any]:
        return {"until": self.until, **self.config.model_dump(mode="json")}

    def check(self, ctx: Context) -> None:
        if self.tensorboard and self.config.quantizer not in LEARNED:
            raise UsageError(
                f"--tensorboard: {self.config.quantizer} has no training to draw",
                f"these have: {', '.join(LEARNED)}; drop --tensorboard, or --quantizer one of them",
            )
        check_board(self.tensorboard)
        if (self.until is None) != (self.events is None):
            raise UsageError(
                "--until needs the log that says which items were known by then, and the log needs --until",
                "add --events e.parquet --until TIME",
            )
        if self.init_from is not None:
            self._check_start(load_codebook(self.init_from), ctx.table("embeddings"))

    def build(self, ctx: Context) -> Mapping[str, Any]:
        table = ctx.table("embeddings")
        known = known_items(ctx.table("events"), self.until) if self.until is not None else None
        codebook = fit_codebook(table, self.config, ctx, known=known, unfitted=self._maker(ctx))
        codebook = replace(codebook, notes={**codebook.notes, "data_cutoff": self.data_cutoff(ctx)})
        codebook.save(ctx.work)
        curve = ctx.scratch / "training-0" / "metrics.jsonl"
        if curve.is_file():
            shutil.copyfile(curve, ctx.work / "metrics.jsonl")
        return {"kind": codebook.kind, "fingerprint": codebook.fingerprint, **_quality(table, codebook, ctx)}

    def lineage(self, ctx: Context) -> Mapping[str, str]:
        encoder = {k: v for k, v in ctx.inputs["embeddings"].lineage.items() if k != "codebook"}
        return encoder | {"codebook": load_codebook(ctx.work).fingerprint}

    def data_cutoff(self, ctx: Context) -> int | None:
        roles = [role for role in ("embeddings", "init_from") if role in ctx.inputs]
        cutoffs = [*(ctx.inputs[role].data_cutoff for role in roles), self.until]
        return max((cutoff for cutoff in cutoffs if cutoff is not None), default=None)

    def _maker(self, ctx: Context) -> Callable[[tuple[int, ...], SidConfig], Quantizer] | None:
        """Makes quantizers of the configured kind, where it is a learned one; each checkpoints on its own."""
        if self.config.quantizer not in LEARNED:
            return None
        number = count()

        def make(sizes: tuple[int, ...], config: SidConfig) -> Quantizer:
            folder = ctx.scratch / f"training-{next(number)}"
            folder.mkdir(parents=True, exist_ok=True)
            quantizer = self._unfitted(sizes)
            board = self.tensorboard / folder.name if self.tensorboard else None
            quantizer.folder, quantizer.log = folder, with_board(ctx.log, board)
            return quantizer

        return make

    def _unfitted(self, sizes: tuple[int, ...]) -> RQVAE | RKMeansFSQ:
        knobs = self.config.network
        if self.config.quantizer == "rkmeans-fsq":
            digits = tuple(knobs.get("digits", ())) or _binary(sizes[-1])
            _check_digits(digits, sizes[-1])
            return RKMeansFSQ(FSQConfig(**{**knobs, "digits": digits, "sizes": sizes[:-1]}))
        learned = RQVAE if self.config.quantizer == "rqvae" else RKMeansPlus
        start = learned.from_codebook(load_codebook(self.init_from)).net if self.init_from else None
        return learned(LEARNED[self.config.quantizer](**{**knobs, "sizes": sizes}), start)

    def _check_start(self, codebook: Codebook, table: Table) -> None:
        if self.config.quantizer not in ("rqvae", "rkmeans-plus") or codebook.kind != self.config.quantizer:
            raise UsageError(
                f"--init-from {self.init_from}: kind {codebook.kind}, to train {self.config.quantizer}",
                "only rqvae and rkmeans-plus go on from a codebook, and from one of their own kind",
            )
        encoder = table.lineage.get("encoder")
        if encoder and codebook.lineage.get("encoder", encoder) != encoder:
            raise ContractError(
                f"{table.path}: made by another encoder than {self.init_from} was trained on",
                "train without --init-from",
            )


def _binary(size: int) -> tuple[int, ...]:
    """As many binary digits as make `size` codes."""
    if size & (size - 1):
        raise UsageError(
            f"rkmeans-fsq: {size} codes are no power of two", "name the digits: network.digits = [8, 6, 5]"
        )
    return (2,) * max(1, int(math.log2(size)))


def _check_digits(digits: tuple[int, ...], size: int) -> None:
    if math.prod(digits) != size:
        raise UsageError(
            f"config: network.digits make {math.prod(digits)} codes, the last level has {size}",
            f"set codes to the sizes of all levels, the last {math.prod(digits)}",
        )


def _quality(table: Table, codebook: Codebook, ctx: Context) -> dict[str, Any]:
    """Reconstruction and use on a sample of the table, and the verdict on it."""
    quantizer = quantizer_class(codebook.kind).from_codebook(codebook)
    x_ND = sample_vectors(table, QUALITY_ROWS, seed=0)
    codes_NL = quantizer.encode(x_ND, threads=ctx.threads, device=ctx.device)
    error, counts = Reconstruction(), SidCounts(codebook.sizes)
    error.update(comparable(quantizer, x_ND), quantizer.decode(codes_NL))
    counts.update(codes_NL)
    use = counts.finalize()
    return {
        "rows_measured": len(x_ND),
        "sizes": list(codebook.sizes),
        **error.finalize(),
        "collision_rate": use.collision_rate,
        "used": [level.used for level in use.levels],
        "perplexity": [level.perplexity for level in use.levels],
        "verdict": [f"{finding.verdict}: {finding.because}" for finding in judge(use)],
    }
