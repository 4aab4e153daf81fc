"""`prerank export`: Write vectors, semantic IDs and models for others."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="export", help="Write vectors, semantic IDs and models for others.", no_args_is_help=True
)
