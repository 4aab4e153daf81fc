"""`prerank train`: Train an encoder, a quantizer, a user model or a scorer."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="train", help="Train an encoder, a quantizer, a user model or a scorer.", no_args_is_help=True
)
