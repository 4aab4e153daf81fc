"""What every command that makes something shares: where to, how to run, when to refuse."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

IO = "Input and output"
RUN = "How to run"
KNOBS = "prerank.knobs"
# command -> its examples; the help shows them and a test runs them
EXAMPLES: dict[str, tuple[str, ...]] = {}


class Device(StrEnum):
    """Where models run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Engine(StrEnum):
    """Who hands out the shards."""

    local = "local"
    torchrun = "torchrun"
    ray = "ray"


class Gate(StrEnum):
    """What a failed quality gate does."""

    fail = "fail"
    warn = "warn"


def load_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Read the command's section of a TOML file: flags become defaults, other keys become model knobs."""
    if path is None:
        return None
    from prerank_tools.errors import UsageError

    try:
        found: Any = tomllib.loads(path.read_text())
    except OSError as fault:
        raise UsageError(f"{path}: {fault.strerror}", "name a TOML file") from fault
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise UsageError(f"{path}: not TOML ({fault})", "see `[embed.items]` in the README") from fault
    for word in ctx.command_path.split()[1:]:
        found = found.get(word, {})
    flags = {parameter.name for parameter in ctx.command.params}
    ctx.default_map = {key: value for key, value in found.items() if key in flags}
    ctx.meta[KNOBS] = {key: value for key, value in found.items() if key not in flags}
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file; its section for this command holds model knobs and defaults of flags.",
        callback=load_config,
        is_eager=True,
        rich_help_panel=RUN,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object.", rich_help_panel=RUN)
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="Folder to make, or a single file where the name ends in .parquet.",
        rich_help_panel=IO,
    ),
]

RUN_OPTIONS: dict[str, tuple[Any, Any]] = {
    "output": (Output, ...),
    "overwrite": (
        Annotated[
            bool,
            typer.Option(
                "--overwrite",
                help="Replace an output of other work, once the new one is whole.",
                rich_help_panel=IO,
            ),
        ],
        False,
    ),
    "compare_to": (
        Annotated[
            Path | None,
            typer.Option(
                help="Last night's output: hold rows, norms and shares against it.", rich_help_panel=IO
            ),
        ],
        None,
    ),
    "gate": (
        Annotated[
            Gate,
            typer.Option(help="A failed quality gate stops the job, or is recorded.", rich_help_panel=IO),
        ],
        Gate.fail,
    ),
    "max_bad": (
        Annotated[
            float, typer.Option(help="Share of unusable rows that is still accepted.", rich_help_panel=IO)
        ],
        0.001,
    ),
    "workers": (
        Annotated[
            int | None,
            typer.Option(
                min=1,
                help="Processes; cores / threads where not given.",
                rich_help_panel=RUN,
                show_default=False,
            ),
        ],
        None,
    ),
    "threads": (
        Annotated[
            int,
            typer.Option(
                min=1, help="Threads a process; bytes repeat at equal threads.", rich_help_panel=RUN
            ),
        ],
        2,
    ),
    "device": (
        Annotated[Device, typer.Option(help="auto takes a GPU where there is one.", rich_help_panel=RUN)],
        Device.auto,
    ),
    "engine": (
        Annotated[Engine, typer.Option(help="Who hands out the shards.", rich_help_panel=RUN)],
        Engine.local,
    ),
    "dry_run": (
        Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.", rich_help_panel=RUN)],
        False,
    ),
    "json": (Json, False),
    "config": (Config, None),
}


def stage_command(
    app: typer.Typer, name: str, *, examples: tuple[str, ...], command: str = ""
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that returns a `Stage` as a command with all the common options.

    A parameter `knobs` of the function receives the model knobs of the TOML file instead of a flag.
    """

    def register(make_stage: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(make_stage)
        def run_command(ctx: typer.Context, **words: Any) -> None:
            from .console import run_stage

            common = {option: words.pop(option) for option in RUN_OPTIONS}
            stage = make_stage(**words, **knobs_for(make_stage, ctx))
            run_stage(stage, common)

        _expose(run_command, make_stage, RUN_OPTIONS)
        _register(app, name, run_command, examples, command)
        return make_stage

    return register


def report_command(
    app: typer.Typer, name: str, *, examples: tuple[str, ...], command: str = ""
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that returns a mapping of numbers as a command that prints it."""
    options: dict[str, tuple[Any, Any]] = {
        "output": (
            Annotated[
                Path | None,
                typer.Option("--output", "-o", help="Write the JSON here as well.", rich_help_panel=IO),
            ],
            None,
        ),
        "json": (Json, False),
        "config": (Config, None),
    }

    def register(measure: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(measure)
        def report(ctx: typer.Context, **words: Any) -> None:
            from .console import print_report

            common = {option: words.pop(option) for option in options}
            print_report(measure(**words, **knobs_for(measure, ctx)), common)

        _expose(report, measure, options)
        _register(app, name, report, examples, command)
        return measure

    return register


def knobs_for(function: Callable[..., Any], ctx: typer.Context) -> dict[str, Any]:
    """The `knobs` argument where the function has one; an unknown key is an error where it has none."""
    knobs = dict(ctx.meta.get(KNOBS, {}))
    if "knobs" in inspect.signature(function).parameters:
        return {"knobs": knobs}
    if knobs:
        from prerank_tools.errors import UsageError

        raise UsageError(f"config: `{next(iter(knobs))}` is not a key of this command", "see its --help")
    return {}


def parse_knobs(model: Any, knobs: Mapping[str, Any]) -> Any:
    """Knobs as the command's pydantic config; an unknown key or a wrong value is an error of usage."""
    from pydantic import ValidationError

    from prerank_tools.errors import UsageError

    try:
        return model(**knobs)
    except ValidationError as fault:
        first = fault.errors()[0]
        key = ".".join(str(word) for word in first["loc"])
        told = first["msg"].removeprefix("Value error, ")  # pydantic's words before a validator's own
        raise UsageError(f"config: `{key}`: {told}", f"keys: {', '.join(model.model_fields)}") from fault


def _expose(wrapper: Callable[..., Any], function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Give the wrapper the signature that Typer reads: the function's own words, then the common ones."""
    ctx = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(function, eval_str=True).parameters.values()
        if parameter.name != "knobs"
    ]
    common = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=annotation,
            default=inspect.Parameter.empty if default is ... else default,
        )
        for name, (annotation, default) in options.items()
    ]
    parameters = [ctx, *own, *common]
    for parameter in parameters:
        for told in getattr(parameter.annotation, "__metadata__", ()):
            # Every flag has a PRERANK_<GROUP>_<COMMAND>_<FLAG>; the README says so once, help would 40 times.
            told.show_envvar = False
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del wrapper.__wrapped__  # type: ignore[attr-defined]


def _register(
    app: typer.Typer, name: str, function: Callable[..., Any], examples: tuple[str, ...], command: str
) -> None:
    EXAMPLES[command or f"{app.info.name} {name}"] = examples
    epilog = "\n\n".join(["Examples:", *(f"  {line}" for line in examples)])
    app.command(name, epilog=epilog)(function)


# The command line that runs now: the demo runs several in one process.
WORDS: ContextVar[tuple[str, ...]] = ContextVar("words", default=())


def argv() -> tuple[str, ...]:
    """The command line as typed, for the manifest."""
    return ("prerank", *WORDS.get())
