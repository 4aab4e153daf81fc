"""prerank: items and behaviour logs in, embeddings, semantic IDs, GSU features and scores out."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from prerank_tools.errors import PrerankError
from prerank_tools.run.heaps import share_heaps
from prerank_tools.version import VERSION

from . import console, data, demo, embed, evaluate, export, gsu, inspection, quantize, score, train
from .options import WORDS

app = typer.Typer(
    name="prerank",
    help=__doc__,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"auto_envvar_prefix": "PRERANK", "help_option_names": ["-h", "--help"]},
)
for group in (data, train, embed, quantize, gsu, export, evaluate):
    app.add_typer(group.app)
for single in (score, inspection, demo):
    single.register(app)


INTERRUPTED = 130


class Terminated(BaseException):
    """SIGTERM: leave through every `finally`, keep the finished shards."""


def main(words: Sequence[str] | None = None) -> None:
    """Run one command line and exit with its code."""
    share_heaps()
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(call(sys.argv[1:] if words is None else words))


def call(words: Sequence[str]) -> int:
    """Run one command line; returns its exit code. Errors are on stderr when it returns."""
    token = WORDS.set(tuple(words))
    try:
        app(list(words), prog_name="prerank")
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer makes this of Ctrl-C, without a word
            console.print_error(PrerankError("interrupted", "run the same line again: finished shards stay"))
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except PrerankError as fault:
        console.print_error(fault)
        return fault.exit_code
    except Terminated:
        console.print_error(PrerankError("terminated", "run the same line again: finished shards stay"))
        return 143
    finally:
        WORDS.reset(token)
    return 0


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough: a second one would meet the way out
    raise Terminated


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prerank {VERSION}")
        raise typer.Exit


@app.callback()
def prerank(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Offline embeddings, semantic IDs, GSU features and scores for pre-ranking, Parquet to Parquet."""
