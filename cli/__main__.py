"""`python -m prerank_cli`: how torchrun starts a rank."""

from __future__ import annotations

from .main import main

main()
