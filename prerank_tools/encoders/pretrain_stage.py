"""`prerank train encoder`: pairs and items in, an item encoder out that `embed items --model` loads."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from prerank_tools.encoders.content_frames import default_template, image_columns
from prerank_tools.encoders.fusion import Fusion, FusionConfig, build_fusion
from prerank_tools.encoders.item_encoder import ItemEncoder
from prerank_tools.encoders.loading import fingerprint_of
from prerank_tools.encoders.model_folder import kind_of, model_digest
from prerank_tools.encoders.pair_batches import Contents, FeatureEncoder
from prerank_tools.encoders.pair_frames import PairContents, read_pairs
from prerank_tools.encoders.pretrain import TrainEncoderConfig, pretrain, split_by_group
from prerank_tools.encoders.pretrain_contents import encode_frozen, raw_contents, tune_towers
from prerank_tools.encoders.saved_models import ItemEncoderConfig, load_item_encoder, save_item_encoder
from prerank_tools.encoders.tower_folders import (
    PARTS,
    Towers,
    TowerSources,
    find_sources,
    install,
    load_towers,
    save_towers,
)
from prerank_tools.encoders.transformers_models import resolve_pooling
from prerank_tools.encoders.vocabulary import extend_vocabulary, frequent_words, train_new_rows
from prerank_tools.errors import ContractError, UsageError
from prerank_tools.stage import Context, Stage
from prerank_tools.tables.table import open_table
from prerank_tools.training.board import check_board, with_board


@dataclass(frozen=True)
class TrainEncoder(Stage):
    """Pre-train an item encoder with SCL (MUSE 1.1) on pairs; what follows the paper is told in `Scl`."""

    name: ClassVar[str] = "train.encoder"
    kind: ClassVar[str] = "model"

    pairs: Path
    items: Path
    model: str | None = None
    image_model: str | None = None
    template: str | None = None
    image_root: Path | None = None  # None: the folder of `items`
    until: int | None = None
    init_from: Path | None = None
    config: TrainEncoderConfig = field(default_factory=TrainEncoderConfig)
    tensorboard: Path | None = None  # where to draw curves

    @cached_property
    def sources(self) -> TowerSources:
        """The towers to start from."""
        return find_sources(self.model, self.image_model, self.init_from)

    @cached_property
    def resolved_template(self) -> str:
        """The template named, else that of `init_from`, else by the columns; "" without a text tower."""
        if self.sources.text is None and self.sources.dual is None:
            return ""
        if self.template is None and self.init_from is not None:
            return load_item_encoder(self.init_from)[0].template
        return self.template or default_template(open_table(self.items, "items").schema)

    def inputs(self) -> Mapping[str, tuple[Path, str]]:
        found = {"pairs": (self.pairs, "pairs"), "items": (self.items, "items")}
        if self.init_from is not None:
            return found | {"init_from": (self.init_from, "")}
        named = {part: getattr(self.sources, part) for part in ("text", "image", "dual")}
        return found | {f"{part}_model": (path, "") for part, path in named.items() if path is not None}

    def params(self) -> Mapping[str, Any]:
        return {
            "template": self.resolved_template,
            "until": self.until,
            **self.config.model_dump(mode="json"),
        }

    def check(self, ctx: Context) -> None:
        """Refuse combinations that cannot learn what they name."""
        check_board(self.tensorboard)
        if self.config.extra_vocab and (self.config.tune == "head" or self.sources.text is None):
            raise UsageError(
                "extra_vocab: new words need a text model that learns",
                "set tune = 'last', 'lora' or 'full', and name a text --model",
            )
        if self.config.neighbours.weight and self.config.tune != "head":
            raise UsageError(
                "neighbours: needs features that stay", "set tune = 'head', or leave neighbours.weight out"
            )
        if self._images(ctx) and self.sources.image is None and self.sources.dual is None:
            ctx.log("images unused", why="no --image-model")

    def build(self, ctx: Context) -> Mapping[str, Any]:
        found = self._read(ctx)
        config = self.config
        install(self.sources, ctx.work)
        split = split_by_group(
            found.pairs, share=config.valid_share, most=config.valid_candidates, seed=config.training.seed
        )
        if not len(split.fit):
            raise ContractError(
                f"{self.pairs}: no pair to learn from", "are its items in --items? --until too early?"
            )
        words = self._extend_vocabulary(found, ctx)
        torch.manual_seed(config.training.seed)
        encoder, contents, towers = self._encoder(found, words, ctx)
        folder = ctx.scratch / "training"
        folder.mkdir(exist_ok=True)
        result, quality = pretrain(
            encoder,
            contents,
            split=split,
            config=config,
            folder=folder,
            device=ctx.device,
            log=with_board(ctx.log, self.tensorboard),
        )
        encoder.cpu()
        if towers is not None:
            save_towers(towers, ctx.work)
        save_item_encoder(ctx.work, self._stated(encoder.fusion, ctx.work), encoder.fusion)  # type: ignore[arg-type]
        shutil.copyfile(folder / "metrics.jsonl", ctx.work / "metrics.jsonl")
        return {
            **quality,
            "held_out_pairs": len(split.valid),
            "pairs": len(split.fit),
            "pairs_dropped": found.dropped,
            "new_words": len(words),
            "steps": result.steps,
            "epochs": result.epochs,
            "best_epoch": result.best_epoch,
            "parameters_trained": sum(p.numel() for p in encoder.parameters() if p.requires_grad),
        }

    def data_cutoff(self, ctx: Context) -> int | None:
        """The latest pair used, and what shaped the items and the model before."""
        cutoffs = [ctx.inputs[role].data_cutoff for role in ctx.inputs if role != "pairs"]
        latest = self._latest(ctx)
        cutoffs.append(ctx.inputs["pairs"].data_cutoff if latest is None else latest)
        return max((cutoff for cutoff in cutoffs if cutoff is not None), default=None)

    def lineage(self, ctx: Context) -> Mapping[str, str]:
        """The fingerprint of the new space's model; each `embed items` adds its own settings."""
        parts = {part: model_digest(ctx.work / part) for part in PARTS if (ctx.work / part).is_dir()}
        parts |= {name: sha256_of(ctx.work / name) for name in ("config.json", "model.safetensors")}
        return {"encoder_model": fingerprint_of(parts)}

    def _images(self, ctx: Context) -> bool:
        return bool(image_columns(ctx.inputs["items"].schema)) or "query_image" in ctx.inputs["pairs"].schema  # type: ignore[union-attr]

    def _latest(self, ctx: Context) -> int | None:
        import polars as pl

        pairs = open_table(self.pairs, "pairs")
        if "timestamp" not in pairs.schema:
            return None
        times = pairs.scan(["timestamp"])
        if self.until is not None:
            times = times.filter(pl.col("timestamp") < self.until)
        found: int | None = times.max().collect().item()
        return found

    def _read(self, ctx: Context) -> PairContents:
        reads_images = self.sources.image is not None or self.sources.dual is not None
        return read_pairs(
            open_table(self.pairs, "pairs"),
            open_table(self.items, "items"),
            template=self.resolved_template,
            images=reads_images,
            root=self.image_root or self.items.parent,
            max_bytes=self.config.image.max_bytes,
            until=self.until,
            category=self.config.category,
        )

    def _extend_vocabulary(self, found: PairContents, ctx: Context) -> list[str]:
        """Give frequent words of the named columns a token each, in `<work>/text`."""
        if not self.config.extra_vocab:
            return []
        table = open_table(self.items, "items")
        frame = table.scan(list(self.config.extra_vocab)).collect()
        texts = [str(value) for name in frame.columns for value in frame[name].drop_nulls().to_list()]
        words = frequent_words(
            texts, min_count=self.config.extra_vocab_count, most=self.config.extra_vocab_size
        )
        assert self.sources.text is not None
        added = extend_vocabulary(self.sources.text, words, ctx.work / "text")
        ctx.log("extra_vocab", words=len(added))
        return added

    def _encoder(
        self, found: PairContents, words: list[str], ctx: Context
    ) -> tuple[nn.Module, Contents, Towers | None]:
        """What learns, the contents it is shown, and the towers where they learn too."""
        if self.config.tune == "head":
            contents = encode_frozen(found, ctx, self.config)
            dims = contents.text_CT.shape[1], contents.image_CI.shape[1]
            return FeatureEncoder(self._fusion(*dims), self.config.feature_dropout), contents, None
        towers = load_towers(ctx.work, self.config.text, self.config.image)
        text_dim, image_dim = (tower.dim if tower is not None else 1 for tower in (towers.text, towers.image))
        tune_towers(towers, self.config)
        if words and towers.text is not None and towers.text.model is not None:
            train_new_rows(towers.text.model, len(words))
        encoder = ItemEncoder(towers.text, towers.image, self._fusion(text_dim, image_dim))
        return encoder, raw_contents(found, towers, self.config, ctx.log), towers

    def _fusion(self, text_dim: int, image_dim: int) -> Fusion:
        shape = self.config.fusion
        if self.init_from is None:
            both = self.sources.dual is not None or None not in (self.sources.text, self.sources.image)
            kind = shape.kind or ("residual" if both else "concat")
            return build_fusion(
                FusionConfig(text_dim=text_dim, image_dim=image_dim, **{**shape.model_dump(), "kind": kind})
            )
        stated, fusion = load_item_encoder(self.init_from)
        if stated.fusion.dim != shape.dim or shape.kind not in (None, stated.fusion.kind):
            raise UsageError(
                f"{self.init_from}: a {stated.fusion.kind} fusion of {stated.fusion.dim} dims",
                "give the same fusion.kind and fusion.dim in --config, or train without --init-from",
            )
        return fusion.train()

    def _stated(self, fusion: Fusion, folder: Path) -> ItemEncoderConfig:
        text = folder / "text"
        pooled = text.is_dir() and kind_of(text) == "text"
        return ItemEncoderConfig(
            template=self.resolved_template,
            fusion=fusion.config,
            pooling=resolve_pooling(text, self.config.text) if pooled else "mean",
            image_pooling=self.config.image.pooling,
            max_tokens=self.config.text.max_tokens,
        )


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
