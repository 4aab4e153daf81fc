"""`prerank data`: Check, bucket, split and sample tables."""

from __future__ import annotations

import typer

app = typer.Typer(name="data", help="Check, bucket, split and sample tables.", no_args_is_help=True)
