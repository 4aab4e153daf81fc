"""`prerank embed items`: items in, one unit vector an item out; only what is new or edited is encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import polars as pl

from prerank_tools.encoders.content_frames import (
    Content,
    columns_of,
    default_template,
    image_columns,
    peek_schema,
    read_content,
    render,
)
from prerank_tools.encoders.embedding_frames import (
    POLARS_OF,
    Dtype,
    embedding_rows,
    empty_rows,
    faults_frame,
)
from prerank_tools.encoders.encode import Encoder
from prerank_tools.encoders.loading import (
    EmbedConfig,
    describe_space,
    fingerprint_of,
    load_encoder,
    refuse_width,
)
from prerank_tools.encoders.model_choice import Choice, choose_modalities, choose_models, stored_template
from prerank_tools.encoders.saved_models import convert_efficientnet_lite0, copy_model, save_tfidf
from prerank_tools.encoders.tfidf import fit
from prerank_tools.errors import ContractError
from prerank_tools.stage import Context, Part, Shard, Stage, Trial
from prerank_tools.tables.contracts import split_rows
from prerank_tools.tables.table import open_table, read_shard, shards_of

SHARD_ROWS = 65_536
IMAGE_SHARD_ROWS = 8_192  # with pictures in the table a row weighs kilobytes
TRIAL_ROWS = {"tfidf": 8_192, "model": 1_024, "image": 64}  # that --dry-run encodes
HELD_COPIES, HELD_ROW_BYTES = 3, 6_000  # memory of a row of a shard: copies of its content, vector and tokens


@dataclass(frozen=True)
class EmbedItems(Stage):
    """Encode the text and images of items; the output's contract is `item_embeddings`."""

    items: Path
    model: str | None = None  # None: that of `previous`, else tfidf
    image_model: str | None = None
    modalities: Literal["auto", "text", "image", "both"] = "auto"
    template: str | None = None
    image_root: Path | None = None  # None: the folder of `items`
    dim: int | None = None
    dtype: Dtype = "fp32"
    previous: Path | None = None
    config: EmbedConfig = field(default_factory=EmbedConfig)

    name = "embed.items"
    output = "item_embeddings"
    sort_key = ("item_id",)
    compression = "uncompressed"

    @cached_property
    def choice(self) -> Choice:
        """Models, modalities and template, resolved against the table and the previous output."""
        schema = peek_schema(self.items)
        before = open_table(self.previous, "item_embeddings").manifest if self.previous else None
        params = before["params"] if before else {}
        slots = choose_models(
            self.model,
            self.image_model,
            modalities=self.modalities,
            previous=params or None,
            at=self.previous,
        )
        template = self.template or stored_template(slots) or params.get("template")
        template = template or default_template(schema)
        asked = params.get("modalities", "auto") if self.modalities == "auto" else self.modalities
        modalities = choose_modalities(
            asked, slots, has_text=bool(template), has_image=bool(image_columns(schema))
        )
        return Choice(slots, modalities, "" if modalities == "image" else template)

    def inputs(self) -> Mapping[str, tuple[Path, str]]:
        found = {"items": (self.items, "items")}
        if self.previous is not None:
            found["previous"] = (self.previous, "item_embeddings")
        return found | {slot.role: (slot.path, "") for slot in self.choice.slots if slot.path is not None}

    def params(self) -> Mapping[str, Any]:
        fits = any(slot.path is None for slot in self.choice.slots)
        return {
            **{slot.role: slot.word for slot in self.choice.slots},
            "modalities": self.choice.modalities,
            "template": self.choice.template,
            "dim": self.dim,
            "dtype": self.dtype,
            **self.config.model_dump(exclude=set() if fits else {"tfidf"}),
        }

    @property
    def folder_only(self) -> bool:
        """A fitted or converted model is published beside its table: tomorrow needs the very same one."""
        return any(slot.stored for slot in self.choice.slots)

    def check(self, ctx: Context) -> None:
        """Columns are looked at before anything is written."""
        schema = ctx.table("items").schema
        if self.choice.modalities != "image" and not self.choice.template:
            raise ContractError(
                f"{self.items}: no text column to encode; it has {', '.join(schema)}",
                "add a `title`, or encode images with --model efficientnet-lite0",
            )
        columns_of(self.choice.template, schema, self.items)
        if self.choice.modalities != "text" and not image_columns(schema):
            raise ContractError(
                f"{self.items}: no column `image` (bytes) or `image_path`; it has {', '.join(schema)}",
                "add one, or use --modalities text",
            )

    def prepare(self, ctx: Context) -> None:
        """Store the models that this output brings with it; hold the previous night to the same space."""
        for slot in self.choice.slots:
            if slot.path is None:
                self._fit(ctx)
            elif slot.converts:
                convert_efficientnet_lite0(slot.path, ctx.work / slot.role)
            elif slot.stored:
                copy_model(slot.path, ctx.work / slot.role)
        if self.previous is not None:
            self._refuse_another_space(ctx)

    def _fit(self, ctx: Context) -> None:
        table, template, settings = ctx.table("items"), self.choice.template, self.config.tfidf
        every = -(-table.rows // settings.fit_items)
        columns = columns_of(template, table.schema, self.items)
        texts = [text for text in render(table.scan(columns).gather_every(every).collect(), template) if text]
        try:
            model = fit(
                texts, settings if self.dim is None else settings.model_copy(update={"dim": self.dim})
            )
        except ValueError as fault:
            raise ContractError(
                f"{self.items}: {template} holds no words to fit TF-IDF on", "name text columns in --template"
            ) from fault
        save_tfidf(model, ctx.work / "model", template=template)
        out = ctx.work.name.removeprefix(".").removesuffix(".partial")
        ctx.log("fitted", model="tfidf", dim=model.dim, terms=len(model.terms), items=len(texts))
        ctx.log("tomorrow", line=f"--model {out}/model", why="a second fit is another space")

    def _refuse_another_space(self, ctx: Context) -> None:
        previous = ctx.table("previous")
        dtype = previous.schema["embedding"]
        if "content_hash" not in previous.schema or getattr(dtype, "inner", None) != POLARS_OF[self.dtype]:
            raise ContractError(
                f"{self.previous}: its embeddings are {dtype} and cannot be taken over as {self.dtype}",
                "name an output of `embed items` of the same --dtype, or leave --previous out",
            )
        if previous.lineage.get("encoder") != self.lineage(ctx)["encoder"]:
            raise ContractError(
                f"{self.previous}: its vectors come from another model, template or modality than tonight's",
                "leave --previous out: every item is encoded then",
            )

    def plan(self, ctx: Context) -> Sequence[Shard]:
        rows = SHARD_ROWS if self.choice.modalities == "text" else IMAGE_SHARD_ROWS
        return shards_of(ctx.table("items"), rows)

    def trials(self, ctx: Context, shards: Sequence[Shard]) -> Sequence[Trial]:
        """The first rows of the largest shard: a model takes minutes over the whole of it."""
        largest = max(shards, key=lambda shard: (shard.rows, -shard.index))
        fits = all(slot.kind == "tfidf" for slot in self.choice.slots)
        rows = TRIAL_ROWS["image" if self.choice.modalities != "text" else "tfidf" if fits else "model"]
        head = replace(largest, rows=min(rows, largest.rows))
        held = read_shard(head, self._columns(ctx)).estimated_size() / max(head.rows, 1)
        total = sum(shard.rows for shard in shards)
        more = (largest.rows - head.rows) * (HELD_COPIES * held + HELD_ROW_BYTES)
        return [Trial(head, total / max(head.rows, 1), int(more))]

    def process(self, shard: Shard, ctx: Context) -> Part:
        """Read content, take over what is unchanged, encode the rest."""
        frame, refused = split_rows(read_shard(shard, self._columns(ctx)), "items")
        frame = frame.sort("item_id")
        content = read_content(
            frame,
            template=self.choice.template,
            images=self.choice.modalities != "text",
            root=self.image_root or self.items.parent,
            max_bytes=self.config.image.max_bytes,
            threads=ctx.threads,
        )
        kept, edited = self._unchanged(frame["item_id"], content, ctx)
        fresh = frame.select(~pl.col("item_id").is_in(kept["item_id"].implode())).to_series()
        encoded, faults = self._encode(frame["item_id"], content, fresh.arg_true().to_list(), ctx)
        whole = encoded  # sorted, as its frame is
        if len(kept):
            whole = pl.concat([encoded, kept.select(encoded.columns)]).sort("item_id")
        counts: dict[str, int | float] = {
            "rows_in": shard.rows,
            "encoded": len(encoded),
            "reused": len(kept),
            "edited": edited,
            "with_text": int(whole["modalities"].str.contains("text").sum()),
            "with_image": int(whole["modalities"].str.contains("image").sum()),
        }
        return Part(whole, pl.concat([refused.select(faults.columns), faults]), counts)

    def _columns(self, ctx: Context) -> list[str]:
        schema = ctx.table("items").schema
        named = ["item_id", *columns_of(self.choice.template, schema, self.items)]
        images = image_columns(schema) if self.choice.modalities != "text" else []
        return list(dict.fromkeys([*named, *images]))

    def _unchanged(self, ids: pl.Series, content: Content, ctx: Context) -> tuple[pl.DataFrame, int]:
        """Rows of the previous output whose item has the same content tonight, and how many were edited."""
        columns = list(empty_rows(ids.dtype, self.dtype, 1).columns)
        if self.previous is None:
            return empty_rows(ids.dtype, self.dtype, self._encoder(ctx).dim), 0
        now = pl.DataFrame({"item_id": ids, "now": content.hashes})
        before = ctx.table("previous").scan(columns).filter(pl.col("item_id").is_in(ids.implode()))
        joined = before.collect().join(now, on="item_id", how="inner")
        same = joined.filter(pl.col("content_hash") == pl.col("now")).drop("now")
        return same, len(joined) - len(same)

    def _encode(
        self, ids: pl.Series, content: Content, rows: Sequence[int], ctx: Context
    ) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Vectors of the rows that have one, and (item_id, reason) of those that have none."""
        if not rows:
            return empty_rows(ids.dtype, self.dtype, self._width(ctx)), faults_frame(ids.clear(), [])
        images = [[] if content.faults[row] else content.images[row] for row in rows]
        found = self._encoder(ctx).encode([content.texts[row] for row in rows], images)
        reasons = [content.faults[row] or fault for row, fault in zip(rows, found.faults, strict=True)]
        good = [n for n, reason in enumerate(reasons) if reason is None]
        bad = [n for n, reason in enumerate(reasons) if reason is not None]
        hashes = [content.hashes[rows[n]] for n in good]
        frame = embedding_rows(ids.gather([rows[n] for n in good]), found, good, hashes, self.dtype)
        return frame, faults_frame(ids.gather([rows[n] for n in bad]), [reasons[n] for n in bad])

    def _encoder(self, ctx: Context) -> Encoder:
        """The encoder of this process, loaded when the first item needs it."""
        if "encoder" not in ctx.cache:
            models = self.choice.models(ctx.work)
            encoder = load_encoder(models, self.config, device=ctx.device, threads=ctx.threads, log=ctx.log)
            if all(slot.kind != "tfidf" for slot in self.choice.slots):
                refuse_width(self.dim, encoder.dim)
            ctx.cache["encoder"] = encoder
        return ctx.cache["encoder"]

    def _width(self, ctx: Context) -> int:
        """Width of the output, without loading a model where the previous night tells it."""
        if self.previous is None:
            return self._encoder(ctx).dim
        return ctx.table("previous").schema["embedding"].size  # type: ignore[attr-defined]

    def quality(self, counts: Mapping[str, float], ctx: Context) -> Mapping[str, Any]:
        """Shares of what vectors were made from; with a previous night, what came and what went."""
        rows = counts["encoded"] + counts["reused"]
        found: dict[str, Any] = {
            "space": dict(self._space(ctx)),
            "missing_share": counts["quarantined"] / max(counts["rows_in"], 1),
            "text_share": counts["with_text"] / max(rows, 1),
            "image_share": counts["with_image"] / max(rows, 1),
        }
        if self.previous is not None:
            found["delisted"] = int(ctx.table("previous").rows - counts["reused"] - counts["edited"])
            found["new"] = int(counts["encoded"] - counts["edited"])
        return found

    def lineage(self, ctx: Context) -> Mapping[str, str]:
        """The encoder's space: equal fingerprints can be compared, others cannot."""
        return {**super().lineage(ctx), "encoder": fingerprint_of(self._space(ctx))}

    def _space(self, ctx: Context) -> Mapping[str, Any]:
        if "space" not in ctx.cache:
            ctx.cache["space"] = describe_space(self.choice.models(ctx.work), self.config)
        return ctx.cache["space"]
