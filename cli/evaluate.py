"""`prerank eval`: Measure embeddings, semantic IDs, GSU, users and scores."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="eval", help="Measure embeddings, semantic IDs, GSU, users and scores.", no_args_is_help=True
)
