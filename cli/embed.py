"""`prerank embed`: Turn items or users into vectors."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import IO, parse_knobs, stage_command
from .times import time_option

app = typer.Typer(name="embed", help="Turn items or users into vectors.", no_args_is_help=True)

MODEL = "Model"


class Modalities(StrEnum):
    """What of an item is encoded."""

    auto = "auto"
    text = "text"
    image = "image"
    both = "both"


class Dtype(StrEnum):
    """How the vectors are stored."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


@stage_command(
    app,
    "items",
    examples=(
        "prerank embed items items.parquet -o emb/",
        "prerank embed items items.parquet --model minilm --template '{title}. {category}' -o emb_minilm/",
    ),
)
def items(
    items: Annotated[Path, typer.Argument(help="Items: item_id, text columns, image or image_path.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="tfidf (fitted, no weights), minilm, efficientnet-lite0, a model folder, or a hub id."
            " Default: that of --previous, else tfidf.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    image_model: Annotated[
        str | None,
        typer.Option(help="A vision model beside a text --model.", rich_help_panel=MODEL),
    ] = None,
    modalities: Annotated[
        Modalities,
        typer.Option(help="auto: all that both model and table have.", rich_help_panel=MODEL),
    ] = Modalities.auto,
    template: Annotated[
        str | None,
        typer.Option(
            help="Text from columns, as in '{title}. {brand}'. Default: that of the model, else {title}.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(
            min=1, help="Width of a TF-IDF fit (128); other models have their own.", rich_help_panel=MODEL
        ),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="int8 comes with a column `scale`.", rich_help_panel=IO)
    ] = Dtype.fp32,
    image_root: Annotated[
        Path | None,
        typer.Option(
            help="Folder that image_path is relative to. Default: that of the items.", rich_help_panel=IO
        ),
    ] = None,
    previous: Annotated[
        Path | None,
        typer.Option(
            help="Last night's output: only new and edited items are encoded, with its model.",
            rich_help_panel=IO,
        ),
    ] = None,
    *,
    knobs: dict[str, Any],
) -> Any:
    """Encode items as unit vectors from their text, their images, or both."""
    from prerank_tools.encoders.loading import EmbedConfig
    from prerank_tools.encoders.stage import EmbedItems

    return EmbedItems(
        items=items,
        model=model,
        image_model=image_model,
        modalities=modalities.value,
        template=template,
        image_root=image_root,
        dim=dim,
        dtype=dtype.value,
        previous=previous,
        config=parse_knobs(EmbedConfig, knobs),
    )


@stage_command(
    app,
    "users",
    examples=(
        "prerank embed users --events events.parquet --embeddings emb/ --model user_model/ "
        "--as-of 2011-09-01 --as-of 2011-10-11 -o uemb/",
        "prerank embed users --events events.parquet --embeddings emb/ --model user_model/ "
        "--requests r.parquet -o uemb_requests/",
    ),
)
def users(
    events: Annotated[Path, typer.Option(help="The behaviour log.", rich_help_panel=IO)],
    embeddings: Annotated[
        Path, typer.Option(help="Item vectors, from the encoder the model was trained with.")
    ],
    model: Annotated[Path, typer.Option(help="A user model, from `prerank train user`.")],
    as_of: Annotated[
        list[int] | None,
        time_option("--as-of", help="Embed every user as of this time; may be repeated."),
    ] = None,
    requests: Annotated[
        Path | None, typer.Option(help="Embed the users of requests as of the day of each request.")
    ] = None,
    previous: Annotated[
        Path | None,
        typer.Option(help="An earlier output: only users whose history changed are computed again."),
    ] = None,
    erased: Annotated[
        Path | None, typer.Option(help="Users to leave out: a Parquet file with a column user_id.")
    ] = None,
) -> Any:
    """Embed users from what they did before a time; consumers join as of."""
    from prerank_tools.users.stage import EmbedUsers

    return EmbedUsers(
        events,
        embeddings,
        model,
        as_of=tuple(as_of or ()),
        requests=requests,
        previous=previous,
        erased=erased,
    )
