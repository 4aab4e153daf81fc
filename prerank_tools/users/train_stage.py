"""`train user`: events and item embeddings in, a LLaTTE user model out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
import torch
from accelerate.utils import send_to_device
from pydantic import BaseModel, ConfigDict, Field, model_validator

from prerank_tools.data.stage import basket_codes
from prerank_tools.errors import ContractError
from prerank_tools.metrics.probability import normalized_entropy
from prerank_tools.metrics.ranking import auc
from prerank_tools.stage import Context, Stage
from prerank_tools.tables.bucketing import hash_ids
from prerank_tools.tables.events import EventLog, as_of, open_events
from prerank_tools.training.board import check_board, with_board
from prerank_tools.training.checkpoints import load_grown
from prerank_tools.training.loop import TrainConfig, train
from prerank_tools.users import artefact, histories
from prerank_tools.users.artefact import UserModelSpec
from prerank_tools.users.backbone import Training
from prerank_tools.users.batches import NextBaskets, Sampling, TrainBatch
from prerank_tools.users.frames import check_ids, columns_of, log_of, same_encoder, vocabulary, width_of
from prerank_tools.users.llatte import LlatteConfig

EVERY = "interaction"  # the one head of a log that names no actions
PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "paper": {"model": LlatteConfig.paper_like().model_dump(), "max_events": 1000},
}


class UserTraining(TrainConfig):
    """How the user model is trained (defaults ours)."""

    epochs: int = Field(default=12, ge=1)
    batch_size: int = Field(default=32, ge=1)
    lr: float = Field(default=5e-4, gt=0)
    warmup_steps: int = Field(default=20, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    patience: int = Field(default=4, ge=0)


class TrainUserConfig(BaseModel):
    """Knobs of `[train.user]`; `preset = "paper"` is the published shape, other keys override it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Literal["small", "paper"] = "small"
    model: LlatteConfig = LlatteConfig()
    training: UserTraining = UserTraining()
    max_events: int = Field(default=128, ge=1)  # newest events of a history
    heads: dict[str, float] = Field(
        default_factory=dict
    )  # action -> weight of its loss; empty: all but impressions
    basket_gap: int = Field(default=1800, ge=0)  # seconds of silence that end a basket where none is named
    baskets_per_user: int = Field(default=32, ge=1)  # the newest
    user_share: float = Field(default=1.0, gt=0, le=1)
    valid_share: float = Field(default=0.1, ge=0, lt=1)  # of the users
    positives: int = Field(default=8, ge=1)
    negatives: int = Field(default=24, ge=1)
    negative_kind: Literal["mixed", "popularity", "uniform"] = "mixed"
    popularity_power: float = Field(default=0.75, ge=0)
    drop_events: float = Field(default=0.3, ge=0, lt=1)  # from the histories trained on
    backbone_layers: int = Field(default=1, ge=1)
    backbone_width: int = Field(default=32, ge=4)
    lag: int = Field(default=0, ge=0)  # seconds until an ingested event can be used

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, given: dict[str, Any]) -> dict[str, Any]:
        preset = PRESETS.get(str(given.get("preset", "small")), {})
        model = given.get("model", {})
        shape = model.model_dump(exclude_unset=True) if isinstance(model, LlatteConfig) else model
        return {**preset, **given, "model": {**preset.get("model", {}), **shape}}


@dataclass(frozen=True)
class TrainUser(Stage):
    """Fit the user model on baskets that start before `until`, each predicted from the history before it."""

    name: ClassVar[str] = "train.user"
    kind: ClassVar[str] = "model"

    events: Path
    embeddings: Path
    until: int | None = None
    init_from: Path | None = None
    config: TrainUserConfig = field(default_factory=TrainUserConfig)
    tensorboard: Path | None = None  # where to draw curves

    def inputs(self) -> Mapping[str, tuple[Path, str]]:
        found = {"events": (self.events, "events"), "embeddings": (self.embeddings, "item_embeddings")}
        return found | ({"init_from": (self.init_from, "")} if self.init_from else {})

    def params(self) -> Mapping[str, Any]:
        return {"until": self.until, **self.config.model_dump(mode="json")}

    def check(self, ctx: Context) -> None:
        check_board(self.tensorboard)
        check_ids(ctx.table("events"), ctx.table("embeddings"))
        if self.init_from is None:
            return
        before = artefact.read_spec(self.init_from)
        same_encoder(ctx.inputs["init_from"].lineage, ctx.inputs["embeddings"].lineage, self.embeddings)
        width = width_of(ctx.table("embeddings"))
        if before.content != width:
            raise ContractError(
                f"{self.embeddings}: {width} dims, {self.init_from} was trained on {before.content}",
                "train without --init-from, or embed the items with the encoder of that model",
            )

    def build(self, ctx: Context) -> Mapping[str, Any]:
        frame, baskets_N = self._read(ctx)
        spec = self._spec(frame, ctx)
        torch.manual_seed(self.config.training.seed)
        model = artefact.build(spec, head_weights=self._head_weights(spec))
        fit, valid = self._batches(frame, baskets_N, spec, ctx)
        if self.init_from is not None:
            load_grown(model, self.init_from)
        scored = list(valid.epoch(0)) if valid else []
        folder = _made(ctx.scratch / "training")
        result = train(
            model,
            fit,
            config=self.config.training,
            folder=folder,
            evaluate=(lambda m: evaluate(m, scored, spec.heads)) if scored else None,  # type: ignore[arg-type]
            monitor="ne" if scored else "loss",
            device=ctx.device,
            log=with_board(ctx.log, self.tensorboard),
        )
        artefact.save(ctx.work, spec, model)
        shutil.copyfile(folder / "metrics.jsonl", ctx.work / "metrics.jsonl")
        return {
            "baskets": len(fit.baskets.rows),
            "baskets_valid": len(valid.baskets.rows) if valid else 0,
            "epochs": result.epochs,
            "best_epoch": result.best_epoch,
            "parameters": sum(p.numel() for p in model.user.parameters()),
            **result.history[result.best_epoch],
        }

    def data_cutoff(self, ctx: Context) -> int | None:
        inherited = [table.data_cutoff for role, table in ctx.inputs.items() if role != "events"]
        return max([cutoff for cutoff in inherited if cutoff is not None] + [self._newest(ctx)])

    def lineage(self, ctx: Context) -> Mapping[str, str]:
        encoder = {k: v for k, v in ctx.inputs["embeddings"].lineage.items() if k == "encoder"}
        return {**encoder, "user_model": artefact.fingerprint(ctx.work)}

    def _newest(self, ctx: Context) -> int:
        """Time of the newest event that was read."""
        scan = ctx.table("events").scan(["timestamp"])
        if self.until is not None:
            scan = scan.filter(pl.col("timestamp") < self.until)
        return int(scan.select(pl.col("timestamp").max()).collect().item())

    def _read(self, ctx: Context) -> tuple[pl.DataFrame, np.ndarray | None]:
        """All events as of `until`, user by user; and each one's basket number where the log names it."""
        log = open_events(ctx.table("events"))
        columns = columns_of(log.table, "basket_id", "session_id")
        frames = [self._some_users(self._bucket(log, bucket, columns)) for bucket in range(log.buckets)]
        frame = pl.concat(frames)
        if not len(frame):
            raise ContractError(
                f"{self.events}: no event before {self.until}", "give a later --until, or an older log"
            )
        named = {"basket_id", "session_id"} & set(frame.columns)
        return frame, basket_codes(frame) if named else None

    def _bucket(self, log: EventLog, bucket: int, columns: list[str]) -> pl.DataFrame:
        frame = log.read(bucket, columns)
        return frame if self.until is None else as_of(frame, self.until, lag=self.config.lag)

    def _some_users(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The share of users that `user_share` leaves, by hash: the same ones every night."""
        if self.config.user_share == 1 or not len(frame):
            return frame
        return frame.filter(pl.Series(_share(frame["user_id"]) < self.config.user_share))

    def _spec(self, frame: pl.DataFrame, ctx: Context) -> UserModelSpec:
        config = self.config
        before = artefact.read_spec(self.init_from) if self.init_from else None
        actions = vocabulary(frame, "action", before.actions if before else ())
        heads = tuple(config.heads) or tuple(a for a in actions if a != "impression") or (EVERY,)
        return UserModelSpec(
            model=config.model,
            content=width_of(ctx.table("embeddings")),
            actions=actions,
            surfaces=vocabulary(frame, "surface", before.surfaces if before else ()),
            heads=tuple(dict.fromkeys((*before.heads, *heads))) if before else heads,
            backbone_layers=config.backbone_layers,
            backbone_width=config.backbone_width,
            max_events=config.max_events,
            lag=config.lag,
        )

    def _batches(
        self, frame: pl.DataFrame, basket_N: np.ndarray | None, spec: UserModelSpec, ctx: Context
    ) -> tuple[NextBaskets, NextBaskets | None]:
        """Baskets to fit on and, of other users, to validate on."""
        log, catalogue, users = log_of(frame, spec, ctx.table("embeddings"), ctx.cache)
        label_NH = _labels(log.action_N, spec)
        found = histories.baskets(log, gap=self.config.basket_gap, basket_N=basket_N)
        positive_S = np.array([bool(label_NH[rows].any()) for rows in found.rows])
        later_S = found.start_S > log.time_N[log.starts[found.user_S]]
        found = found.take(np.flatnonzero(positive_S & later_S))
        found = found.take(histories.newest_per_user(found.user_S, limit=self.config.baskets_per_user))
        known = histories.as_of(log, found.user_S, found.start_S, limit=spec.max_events)
        usable = known.count_S > 0  # an earlier event may have come in late
        if not usable.any():
            raise ContractError(
                f"{self.events}: no user has a basket after an earlier one",
                "give a longer log; the user model learns from what followed a history",
            )
        valid_S = usable & (_share(users)[found.user_S] < self.config.valid_share)
        fit_S = usable & ~valid_S if (usable & ~valid_S).any() else usable

        def batches(which_S: np.ndarray, *, fit: bool) -> NextBaskets:
            which = np.flatnonzero(which_S)
            return NextBaskets(
                log, catalogue, known.take(which), found.take(which), label_NH, self._sampling(fit=fit),
                self.config.training.batch_size, self.config.training.seed,
            )  # fmt: skip

        return batches(fit_S, fit=True), batches(valid_S, fit=False) if valid_S.any() else None

    def _sampling(self, *, fit: bool) -> Sampling:
        config = self.config
        return Sampling(
            config.positives,
            config.negatives,
            config.negative_kind,
            config.popularity_power,
            config.drop_events if fit else 0.0,
        )

    def _head_weights(self, spec: UserModelSpec) -> tuple[float, ...]:
        return tuple(self.config.heads.get(head, 1.0) for head in spec.heads)


def evaluate(model: Training, batches: Sequence[TrainBatch], heads: Sequence[str]) -> dict[str, float]:
    """NE and AUC of each head on sampled candidates, and `ne`, the mean; heads of one class are left out."""
    rows = [_scored(model, batch) for batch in batches]
    prob_RH = np.concatenate([prob for prob, _ in rows])
    label_RH = np.concatenate([label for _, label in rows])
    found: dict[str, float] = {}
    for head, prob_R, label_R in zip(heads, prob_RH.T, label_RH.T, strict=True):
        if 0 < label_R.sum() < len(label_R):
            found[f"ne_{head}"] = normalized_entropy(label_R, prob_R)
            found[f"auc_{head}"] = auc(label_R, prob_R)
    return {"ne": float(np.mean([v for k, v in found.items() if k.startswith("ne_")] or [1.0])), **found}


def _scored(model: Training, batch: TrainBatch) -> tuple[np.ndarray, np.ndarray]:
    device = next(model.parameters()).device
    moved = send_to_device(batch, device)
    counted = batch.weight_BK.numpy() > 0
    return model.logits(moved).sigmoid().float().cpu().numpy()[counted], batch.label_BKH.numpy()[counted]


def _labels(action_N: np.ndarray, spec: UserModelSpec) -> np.ndarray:
    """(N, H) bool: a log without actions has one head, and every event is one of its positives."""
    if not spec.actions:
        return np.ones((len(action_N), len(spec.heads)), dtype=bool)
    places = [spec.actions.index(head) + 1 if head in spec.actions else -1 for head in spec.heads]
    return action_N[:, None] == np.array(places)


def _share(ids: pl.Series) -> np.ndarray:
    """Each id as a number in [0, 1), fixed for ever: users below a share are the same ones every night."""
    return hash_ids(ids) / 2.0**64


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
