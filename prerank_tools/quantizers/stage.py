"""`quantize sid`: item embeddings in, semantic IDs out; published SIDs never move under a frozen codebook."""
# N items, D dims, L levels

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from prerank_tools.errors import ContractError, UsageError
from prerank_tools.quantizers.codebook import Codebook, Quantizer, load_codebook, quantizer_of
from prerank_tools.quantizers.collisions import Policy
from prerank_tools.quantizers.drift import match_codebook
from prerank_tools.quantizers.fit_stage import SidConfig, fit_codebook, known_items, read_vectors, trial_fits
from prerank_tools.quantizers.mapped_frames import Mapped, mapped_frame
from prerank_tools.quantizers.publish_stage import Settled, hold_drift, settle
from prerank_tools.quantizers.published_frames import ledger_to
from prerank_tools.quantizers.row_facts import row_facts
from prerank_tools.stage import Context, Part, Shard, Stage, Trial
from prerank_tools.tables.table import Table, shards_of


@dataclass(frozen=True)
class QuantizeSids(Stage):
    """One SID an item. Without a `codebook` one is fitted; either way the output holds it as `codebook/`.

    With `previous` of the same codebook published SIDs stay, of edited items too unless `reassign_changed`;
    of another codebook, churn is reported. `match` renumbers a new codebook after an old one.
    """

    name: ClassVar[str] = "quantize.sid"
    output: ClassVar[str] = "item_sids"
    sort_key: ClassVar[tuple[str, ...]] = ("item_id",)
    reduce_row_bytes: ClassVar[int] = 28  # 18 where most items share a SID, 55 where most have their own
    tables: ClassVar[Mapping[str, str]] = {"duplicates": ""}

    embeddings: Path
    codebook: Path | None = None
    previous: Path | None = None
    match: Path | None = None
    events: Path | None = None
    until: int | None = None
    collisions: Policy = "keep"
    reassign_changed: bool = False
    config: SidConfig = field(default_factory=SidConfig)

    def inputs(self) -> Mapping[str, tuple[Path, str]]:
        found = {"embeddings": (self.embeddings, "item_embeddings")}
        more = {
            "codebook": (_codebook_folder(self.codebook), ""),
            "previous": (self.previous, "item_sids"),
            "match": (_codebook_folder(self.match), ""),
            "events": (self.events, "events"),
        }
        return found | {role: (path, contract) for role, (path, contract) in more.items() if path}

    def params(self) -> Mapping[str, Any]:
        return {
            "collisions": self.collisions,
            "reassign_changed": self.reassign_changed,
            "until": self.until,
            **self.config.model_dump(mode="json"),
        }

    def check(self, ctx: Context) -> None:
        self._check_flags()
        table = ctx.table("embeddings")
        for role in ("codebook", "match"):
            if role in ctx.inputs:
                check_space(load_codebook(ctx.inputs[role].path), table)
        if "previous" in ctx.inputs:
            _check_ids(ctx.table("previous"), table)

    def _check_flags(self) -> None:
        if self.codebook and self.match:
            raise UsageError("--match renumbers a new codebook, --codebook takes an old one", "drop one")
        if (self.until is None) != (self.events is None):
            raise UsageError(
                "--until needs the log that says which items were known by then, and the log needs --until",
                "add --events e.parquet --until TIME",
            )
        if self.until is not None and self.codebook:
            raise UsageError("--until bounds a fit, but --codebook is fitted already", "drop one of them")
        if self.reassign_changed and not self.previous:
            raise UsageError("--reassign-changed says what to do with published SIDs", "add --previous SIDS")

    def plan(self, ctx: Context) -> Sequence[Shard]:
        return shards_of(ctx.table("embeddings"))

    def prepare(self, ctx: Context) -> None:
        if self.codebook is not None:
            codebook = load_codebook(ctx.inputs["codebook"].path)
        else:
            codebook = self._fit(ctx)
        codebook.save(ctx.work / "codebook")

    def prepare_trials(self, ctx: Context, trials: Sequence[Trial]) -> None:
        """The codebook named, or one from fits that take a third of the time."""
        configs = (self.config,) if self.codebook else trial_fits(ctx.table("embeddings").rows, self.config)
        for config in configs:
            replace(self, config=config).prepare(ctx)

    def _fit(self, ctx: Context) -> Codebook:
        known = known_items(ctx.table("events"), self.until) if self.until is not None else None
        codebook = fit_codebook(ctx.table("embeddings"), self.config, ctx, known=known)
        codebook = replace(codebook, notes={**codebook.notes, "data_cutoff": self._own_cutoff(ctx)})
        if self.match is not None:
            codebook = match_codebook(codebook, load_codebook(ctx.inputs["match"].path))
        out = ctx.work.name.removeprefix(".").removesuffix(".partial")
        ctx.log(
            "codebook",
            fingerprint=codebook.fingerprint,
            stored=f"{out}/codebook",
            note="fitted now; fitting again would move every SID",
            tomorrow=f"prerank quantize sid EMBEDDINGS --codebook {out}/codebook --previous {out} -o NEXT",
        )
        return codebook

    def process(self, shard: Shard, ctx: Context) -> Part:
        frame, x_ND, bad = read_vectors(shard)
        quantizer = _quantizer(ctx)
        codes_NL = quantizer.encode(x_ND, threads=ctx.threads, device=ctx.device)
        error_NL, hash_N, squares = row_facts(quantizer, x_ND, codes_NL)
        counts = {
            "rows_in": len(frame) + len(bad),
            "squared_error": float(error_NL[:, -1].sum(dtype=np.float64)),
            "squared_norm": squares,
        }
        rows = mapped_frame(frame, codes_NL, quantizer.sizes, error_NL, hash_N)
        return Part(rows.sort("item_id"), bad, counts)

    def reduce(self, parts: Sequence[Path], ctx: Context) -> Iterator[Part]:
        codebook = load_codebook(ctx.work / "codebook")
        settled = settle(Mapped.of(parts), codebook, self._policy(), ctx)
        if self.codebook is not None:
            hold_drift(settled, codebook, self.config, ctx)
        ledger_to(ctx.work / "suffixes", settled.ledger)
        ctx.cache["quality"] = settled.quality | {"codebook": self._about(codebook)}
        return _parts(settled)

    def quality(self, counts: Mapping[str, float], ctx: Context) -> Mapping[str, Any]:
        found = dict(ctx.cache["quality"])
        found["relative_error"] = counts["squared_error"] / max(counts["squared_norm"], 1e-30)
        return found

    def lineage(self, ctx: Context) -> Mapping[str, str]:
        encoder = {k: v for k, v in ctx.inputs["embeddings"].lineage.items() if k != "codebook"}
        return encoder | {"codebook": load_codebook(ctx.work / "codebook").fingerprint}

    def data_cutoff(self, ctx: Context) -> int | None:
        cutoffs = [self._own_cutoff(ctx), load_codebook(ctx.work / "codebook").notes.get("data_cutoff")]
        return max((cutoff for cutoff in cutoffs if cutoff is not None), default=None)

    def _own_cutoff(self, ctx: Context) -> int | None:
        """Of the embeddings and, as of `until`, of the log; a previous table shapes no code of a new item."""
        cutoffs = [ctx.inputs["embeddings"].data_cutoff, self.until]
        return max((cutoff for cutoff in cutoffs if cutoff is not None), default=None)

    def _policy(self) -> tuple[Policy, bool, SidConfig]:
        return self.collisions, self.reassign_changed, self.config

    def _about(self, codebook: Codebook) -> dict[str, Any]:
        return {
            "kind": codebook.kind,
            "sizes": list(codebook.sizes),
            "fingerprint": codebook.fingerprint,
            "fitted_now": self.codebook is None,
            "fitted_on": codebook.notes.get("rows"),
        }


def check_space(codebook: Codebook, table: Table) -> None:
    """Refuse vectors of another width or of another encoder than the codebook was fitted on."""
    width = getattr(table.schema["embedding"], "size", codebook.width)
    if width != codebook.width:
        raise ContractError(
            f"{table.path}: column `embedding` is {width} wide, the codebook was fitted on {codebook.width}",
            "embed with the encoder of the codebook, or leave --codebook out to fit a new one",
        )
    ours, theirs = table.lineage.get("encoder"), codebook.lineage.get("encoder")
    if ours and theirs and ours != theirs:
        raise ContractError(
            f"{table.path}: made by encoder {ours[:12]}, the codebook was fitted on encoder {theirs[:12]}",
            "embed with the encoder of the codebook, or leave --codebook out to fit a new one",
        )


def _parts(settled: Settled) -> Iterator[Part]:
    for index, frame in enumerate(settled.frames()):
        yield Part(frame, tables={"duplicates": settled.duplicates} if index == 0 else {})


def _quantizer(ctx: Context) -> Quantizer:
    if "quantizer" not in ctx.cache:
        ctx.cache["quantizer"] = quantizer_of(load_codebook(ctx.work / "codebook"))
    found: Quantizer = ctx.cache["quantizer"]
    return found


def _codebook_folder(path: Path | None) -> Path | None:
    """The codebook itself where a whole output of `quantize sid` is named."""
    return path / "codebook" if path is not None and (path / "codebook" / "config.json").is_file() else path


def _check_ids(previous: Table, table: Table) -> None:
    kinds = [one.schema["item_id"].is_integer() for one in (previous, table)]
    if kinds[0] != kinds[1]:
        raise ContractError(
            f"{previous.path}: column `item_id` is {previous.schema['item_id']}, "
            f"in {table.path} {table.schema['item_id']}",
            "write both ids as int64, or both as strings",
        )
