"""`train scorer`: labelled requests and the tables around them in, a three-tower scorer out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
import torch
from pydantic import BaseModel, ConfigDict, Field

from prerank_tools.errors import ContractError
from prerank_tools.metrics.probability import normalized_entropy
from prerank_tools.metrics.ranking import auc
from prerank_tools.scorers import artefact, request_frames
from prerank_tools.scorers.artefact import InputConfig, ScorerSpec
from prerank_tools.scorers.checks import check_cutoffs, check_inputs, check_spaces
from prerank_tools.scorers.input_frames import Chunk, InputPaths, ScorerInputs, event_log, open_scorer_inputs
from prerank_tools.scorers.item_frames import category_words
from prerank_tools.scorers.packing import ItemArrays, RequestArrays, join_requests, pack, sample_negatives
from prerank_tools.scorers.serving import weights_digest
from prerank_tools.scorers.three_tower import InputShape, ThreeTower, ThreeTowerConfig
from prerank_tools.stage import Context, Stage
from prerank_tools.training.batches import ShuffledRows
from prerank_tools.training.board import check_board, with_board
from prerank_tools.training.loop import TrainConfig, train


class ScorerTraining(TrainConfig):
    """How the scorer is trained (defaults ours); `batch_size` counts requests."""

    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=32, ge=1)
    lr: float = Field(default=2e-3, gt=0)
    warmup_steps: int = Field(default=20, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    patience: int = Field(default=3, ge=0)


class TrainScorerConfig(BaseModel):
    """Knobs of `[train.scorer]`: `model`, `inputs` and `training` are tables of their own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ThreeTowerConfig = ThreeTowerConfig()
    inputs: InputConfig = InputConfig()
    training: ScorerTraining = ScorerTraining()
    valid_share: float = Field(default=0.1, ge=0, lt=1)  # of the requests, the latest ones


@dataclass(frozen=True)
class TrainScorer(Stage):
    """Fit the scorer on requests before `until`; the latest of them choose the epoch to keep."""

    name: ClassVar[str] = "train.scorer"
    kind: ClassVar[str] = "model"

    paths: InputPaths
    until: int | None = None
    init_from: Path | None = None
    config: TrainScorerConfig = field(default_factory=TrainScorerConfig)
    tensorboard: Path | None = None  # where to draw curves

    def inputs(self) -> Mapping[str, tuple[Path, str]]:
        """The tables, and the model to go on from."""
        return self.paths.roles() | ({"init_from": (self.init_from, "")} if self.init_from else {})

    def params(self) -> Mapping[str, Any]:
        """The time to stop at and all knobs."""
        return {"until": self.until, **self.config.model_dump(mode="json")}

    def check(self, ctx: Context) -> None:
        """Refuse inputs that do not fit together or have seen the time after `until`."""
        check_board(self.tensorboard)
        check_inputs(ctx, self.config.inputs)
        check_spaces(ctx)
        if not request_frames.tasks_of(ctx.table("requests")):
            raise ContractError(
                f"{self.paths.requests}: no column `label_<task>` to learn from",
                "add one, for example label_click: a list of 0 and 1 beside the candidates",
            )
        if self.until is not None:
            check_cutoffs(ctx, self.until, what="the evaluation")

    def build(self, ctx: Context) -> Mapping[str, Any]:
        """Read, scale, train, write; returns the metrics of the latest requests."""
        spec, inputs = self._open(ctx)
        requests, time_R = self._read(ctx, inputs, spec.shape.tasks)
        spec = spec.model_copy(update={"shape": self._shape(inputs, requests, spec)})
        fit_R, valid_R = split_latest(time_R, self.config.valid_share)
        torch.manual_seed(self.config.training.seed)
        model, items = ThreeTower(spec.shape, spec.model), inputs.catalogue.arrays
        if self.init_from is None:
            fit_scales(model, requests, items, fit_R)
        keep_n = sample_negatives(requests.label_nK, spec.model.negative_rate, seed=self.config.training.seed)
        batches = ShuffledRows(
            len(fit_R),
            lambda rows_B: pack(requests, items, fit_R[rows_B], keep_n=keep_n),
            batch_size=self.config.training.batch_size,
            seed=self.config.training.seed,
        )
        folder = ctx.scratch / "training"
        folder.mkdir(exist_ok=True)
        result = train(
            model,
            batches,
            config=self.config.training,
            folder=folder,
            evaluate=(lambda m: evaluate(m, requests, items, valid_R, ctx.device)) if len(valid_R) else None,  # type: ignore[arg-type]
            monitor="ne" if len(valid_R) else "loss",
            init_from=self.init_from,
            device=ctx.device,
            log=with_board(ctx.log, self.tensorboard),
        )
        artefact.save(ctx.work, spec, model.cpu())
        shutil.copyfile(folder / "metrics.jsonl", ctx.work / "metrics.jsonl")
        return {
            "requests": len(fit_R),
            "requests_valid": len(valid_R),
            "candidates": len(requests.item_n),
            "epochs": result.epochs,
            "best_epoch": result.best_epoch,
            "parameters": sum(p.numel() for p in model.parameters()),
            "multiply_adds": model.multiply_adds(),
            **result.history[result.best_epoch],
        }

    def data_cutoff(self, ctx: Context) -> int | None:
        """The latest training request, or what an input had seen if that is later."""
        scan = ctx.table("requests").scan(["timestamp"])
        if self.until is not None:
            scan = scan.filter(pl.col("timestamp") < self.until)
        latest = scan.select(pl.col("timestamp").max()).collect().item()
        inherited = [t.data_cutoff for role, t in ctx.inputs.items() if role not in ("requests", "events")]
        return max([cutoff for cutoff in (latest, *inherited) if cutoff is not None], default=None)

    def lineage(self, ctx: Context) -> Mapping[str, str]:
        """The spaces of all inputs, and this scorer's weights."""
        merged: dict[str, str] = {}
        for role, table in ctx.inputs.items():
            merged |= dict(table.lineage) if role not in ("requests", "events", "init_from") else {}
        return merged | {"scorer": weights_digest(artefact.load(ctx.work)[1])}

    def _open(self, ctx: Context) -> tuple[ScorerSpec, ScorerInputs]:
        tasks = request_frames.tasks_of(ctx.table("requests"))
        knobs = self.config.inputs
        words: Mapping[str, tuple[str, ...]] = category_words(
            ctx.table("items"), knobs.categories, most=knobs.category_words
        )
        if self.init_from is not None:
            words = grown_words(artefact.read_spec(self.init_from).vocabularies, words)
        inputs = open_scorer_inputs(
            ctx, knobs, vocabularies=words, with_users="users" in ctx.inputs, with_sids="sids" in ctx.inputs
        )
        shape = InputShape(user_blocks={}, item_blocks={}, cross_blocks={}, code_sizes={}, tasks=tasks)
        spec = ScorerSpec(
            model=self.config.model,
            inputs=knobs,
            shape=shape,
            content=inputs.catalogue.content_ND.shape[1],
            user=inputs.user_blocks().get("vector", 0),
            levels=inputs.catalogue.levels,
            vocabularies=dict(inputs.catalogue.vocabularies),
        )
        return spec, inputs

    def _read(
        self, ctx: Context, inputs: ScorerInputs, tasks: tuple[str, ...]
    ) -> tuple[RequestArrays, np.ndarray]:
        """Every labelled request before `until`, and its time."""
        chunks: list[Chunk] = []
        for bucket in range(event_log(ctx).buckets):
            good, _ = inputs.requests(bucket)
            if self.until is not None:
                good = good.filter(pl.col("timestamp") < self.until)
            chunks += inputs.chunks(good, bucket=bucket, tasks=tasks)
        if not chunks:
            raise ContractError(
                f"{self.paths.requests}: no request before {self.until}",
                "give a later --until, or older requests",
            )
        time_R = np.concatenate([chunk.flat.requests["timestamp"].to_numpy() for chunk in chunks])
        return join_requests([chunk.arrays for chunk in chunks]), time_R

    def _shape(self, inputs: ScorerInputs, requests: RequestArrays, spec: ScorerSpec) -> InputShape:
        cross = inputs.cross_blocks(0)
        sizes = dict(inputs.catalogue.code_sizes)
        if self.init_from is not None:
            before = artefact.read_spec(self.init_from).shape.code_sizes
            sizes = {name: max(size, before.get(name, 0)) for name, size in sizes.items()}
        return InputShape(
            user_blocks=inputs.user_blocks(),
            item_blocks=inputs.catalogue.item_blocks,
            cross_blocks=cross | {"crosses": requests.cross_nF.shape[1] - sum(cross.values())},
            code_sizes=sizes,
            tasks=spec.shape.tasks,
        )


def split_latest(time_R: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Requests to fit on, and the latest `share` of them to validate on; no time is on both sides."""
    everything = np.arange(len(time_R))
    wanted = int(len(time_R) * share)
    if not wanted:
        return everything, everything[:0]
    start = np.sort(time_R)[len(time_R) - wanted]
    late_R = time_R >= start
    return (everything, everything[:0]) if late_R.all() else (everything[~late_R], everything[late_R])


def fit_scales(model: ThreeTower, requests: RequestArrays, items: ItemArrays, fit_R: np.ndarray) -> None:
    """Fit the model's input scaling on the requests it is trained on."""
    batch = pack(requests, items, fit_R)
    model.fit_inputs(batch["user_BF"], batch["item_mF"], batch["cross_nF"], batch["label_nK"])


def evaluate(
    model: ThreeTower, requests: RequestArrays, items: ItemArrays, valid_R: np.ndarray, device: str
) -> dict[str, float]:
    """NE and AUC of the first task, and the mean NE over tasks as `ne`, on calibrated probabilities."""
    logits, labels = [], []
    for start in range(0, len(valid_R), 256):
        batch = pack(requests, items, valid_R[start : start + 256])
        logits.append(model.logits({k: v.to(device) for k, v in batch.items()}).double().cpu())
        labels.append(batch["label_nK"])
    logit_nK, label_nK = torch.cat(logits).numpy(), torch.cat(labels).numpy()
    # undoing the negatives' down-sampling is a shift of the logit
    prob_nK = 1 / (1 + np.exp(-(logit_nK + np.log(model.config.negative_rate))))
    found: dict[str, float] = {}
    for column, task in enumerate(model.shape.tasks):
        known = ~np.isnan(label_nK[:, column])
        label, prob = label_nK[known, column], prob_nK[known, column]
        if 0 < label.sum() < len(label):
            found |= {f"ne_{task}": normalized_entropy(label, prob), f"auc_{task}": auc(label, prob)}
    values = [value for name, value in found.items() if name.startswith("ne_")]
    return found | {"ne": float(np.mean(values)) if values else 1.0}


def grown_words(
    before: Mapping[str, tuple[str, ...]], now: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Yesterday's vocabularies with new words at the end: a code never changes its meaning."""
    return {
        name: (*before.get(name, ()), *(word for word in words if word not in before.get(name, ())))
        for name, words in now.items()
    }
