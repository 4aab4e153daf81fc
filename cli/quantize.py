"""`prerank quantize`: Turn item embeddings into semantic IDs."""

from __future__ import annotations

import typer

app = typer.Typer(name="quantize", help="Turn item embeddings into semantic IDs.", no_args_is_help=True)
