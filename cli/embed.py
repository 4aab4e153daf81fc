"""`prerank embed`: Turn items or users into vectors."""

from __future__ import annotations

import typer

app = typer.Typer(name="embed", help="Turn items or users into vectors.", no_args_is_help=True)
