"""`prerank train`: Train an encoder, a quantizer, a user model or a scorer."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import IO, RUN, parse_knobs, stage_command
from .score import Embeddings, Events, Features, Gsu, Items, Requests, Sids, Users
from .times import Until

app = typer.Typer(
    name="train", help="Train an encoder, a quantizer, a user model or a scorer.", no_args_is_help=True
)

Tensorboard = Annotated[
    Path | None,
    typer.Option(help="Folder to draw curves in (needs the extra `tensorboard`).", rich_help_panel=RUN),
]


@stage_command(
    app,
    "scorer",
    examples=(
        "prerank train scorer --requests train_requests/ --events e.parquet --items items.parquet "
        "--embeddings emb/ -o scorer/",
        "prerank train scorer --requests train_requests/ --events e.parquet --items items.parquet "
        "--embeddings emb/ --users uemb/ --until 2011-10-11 -o scorer_users/",
    ),
)
def scorer(
    requests: Requests,
    events: Events,
    items: Items,
    embeddings: Embeddings,
    users: Users = None,
    sids: Sids = None,
    gsu: Gsu = None,
    features: Features = None,
    until: Until = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Yesterday's scorer, to go on from.", rich_help_panel=IO)
    ] = None,
    tensorboard: Tensorboard = None,
    knobs: dict[str, Any] | None = None,
) -> Any:
    """Train the three-tower scorer on labelled requests: user, item and cross tower, one head a label.

    Keys of the config: model, inputs, training (tables of their own) and valid_share.
    """
    from prerank_tools.scorers.input_frames import InputPaths
    from prerank_tools.scorers.train_stage import TrainScorer, TrainScorerConfig

    paths = InputPaths(
        requests, events, items, embeddings, users=users, sids=sids, gsu=gsu, features=features
    )
    config = parse_knobs(TrainScorerConfig, knobs or {})
    return TrainScorer(paths, until=until, init_from=init_from, config=config, tensorboard=tensorboard)


@stage_command(
    app,
    "user",
    examples=(
        "prerank train user --events events.parquet --embeddings emb/ --until 2011-09-01 -o user_model/",
        "prerank train user --events events.parquet --embeddings emb/ --until 2011-10-11 "
        "--init-from user_model/ -o user_model_next/",
    ),
)
def user(
    events: Events,
    embeddings: Embeddings,
    until: Until = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Yesterday's user model, to go on from.", rich_help_panel=IO)
    ] = None,
    tensorboard: Tensorboard = None,
    knobs: dict[str, Any] | None = None,
) -> Any:
    """Train the LLaTTE user model: each basket is predicted from the history before it, target-free.

    Keys of the config: preset (small, paper), model, training, max_events, heads and others.
    """
    from prerank_tools.users.train_stage import TrainUser, TrainUserConfig

    config = parse_knobs(TrainUserConfig, knobs or {})
    return TrainUser(
        events, embeddings, until=until, init_from=init_from, config=config, tensorboard=tensorboard
    )


@stage_command(
    app,
    "encoder",
    examples=(
        "prerank train encoder --pairs pairs/ --items items.parquet --model minilm -o encoder/",
        "prerank train encoder --pairs pairs/ --items items.parquet --model minilm "
        "--image-model efficientnet-lite0 --until 2011-10-11 -o encoder_both/",
    ),
)
def encoder(
    pairs: Annotated[
        Path,
        typer.Option(
            help="query_text, query_image or query_item_id, with item_id: from `data pairs`.",
            rich_help_panel=IO,
        ),
    ],
    items: Items,
    model: Annotated[
        str,
        typer.Option(help="Text or dual encoder to start from: a name, a folder, or a hub id."),
    ] = "minilm",
    image_model: Annotated[str | None, typer.Option(help="A vision model beside a text --model.")] = None,
    template: Annotated[
        str | None, typer.Option(help="Text of an item from its columns. Default: {title}.")
    ] = None,
    image_root: Annotated[
        Path | None,
        typer.Option(
            help="Folder that image_path is relative to. Default: that of the items.", rich_help_panel=IO
        ),
    ] = None,
    until: Until = None,
    init_from: Annotated[
        Path | None,
        typer.Option(help="Yesterday's encoder, to go on from; it brings its towers.", rich_help_panel=IO),
    ] = None,
    tensorboard: Tensorboard = None,
    knobs: dict[str, Any] | None = None,
) -> Any:
    """Pre-train an item encoder on pairs (SCL): contrastive, with a momentum bank and hard negatives.

    Keys of the config: scl, training, fusion, tune (head, last, lora, full), category, extra_vocab, ...
    neighbours keeps whole items near their likes; it is on where the pairs are pictures and titles.
    """
    from prerank_tools.encoders.pretrain import TrainEncoderConfig
    from prerank_tools.encoders.pretrain_stage import TrainEncoder

    return TrainEncoder(
        pairs,
        items,
        model=model,
        image_model=image_model,
        template=template,
        image_root=image_root,
        until=until,
        init_from=init_from,
        config=parse_knobs(TrainEncoderConfig, knobs or {}),
        tensorboard=tensorboard,
    )


class Quantizer(StrEnum):
    """Kinds of codebooks."""

    rkmeans = "rkmeans"
    balanced = "balanced-rkmeans"
    rqvae = "rqvae"
    rkmeans_plus = "rkmeans-plus"
    fsq = "rkmeans-fsq"
    pq = "pq"
    random = "random-hash"


@stage_command(
    app,
    "quantizer",
    examples=(
        "prerank train quantizer emb/ -o codebook/",
        "prerank train quantizer emb/ --quantizer rqvae -o codebook_rqvae/",
    ),
)
def quantizer(
    embeddings: Annotated[Path, typer.Argument(help="Item embeddings, one vector an item.")],
    quantizer: Annotated[Quantizer, typer.Option(help="Kind of codebook.")] = Quantizer.rkmeans,
    events: Annotated[
        Path | None,
        typer.Option(help="With --until: fit on items with an event before it.", rich_help_panel=IO),
    ] = None,
    until: Until = None,
    init_from: Annotated[
        Path | None,
        typer.Option(help="Yesterday's rqvae or rkmeans-plus codebook, to go on from.", rich_help_panel=IO),
    ] = None,
    tensorboard: Tensorboard = None,
    knobs: dict[str, Any] | None = None,
) -> Any:
    """Fit a codebook for `quantize sid --codebook`: residual k-means, RQ-VAE, FSQ, OPQ or a random control.

    Keys of the config: levels, codes, iterations, seed, balance, network (code_dim, hidden, train, ...), ...
    """
    from prerank_tools.quantizers.train_stage import TrainQuantizer, TrainQuantizerConfig

    config = parse_knobs(TrainQuantizerConfig, {**(knobs or {}), "quantizer": quantizer.value})
    return TrainQuantizer(
        embeddings, events=events, until=until, init_from=init_from, config=config, tensorboard=tensorboard
    )
