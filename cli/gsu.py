"""`prerank gsu`: Search each user's past for what resembles a candidate."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="gsu", help="Search each user's past for what resembles a candidate.", no_args_is_help=True
)
