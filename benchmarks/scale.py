"""Stages at 1 M and 10 M rows in one process: peak anonymous memory, CPU a row, time outside of compute.

    python benchmarks/scale.py --data FOLDER --generate
    python benchmarks/scale.py --data FOLDER --lines "quantize sid" --repeats 5 --found runs.jsonl
    python benchmarks/scale.py --data FOLDER --extremes --found runs.jsonl
    python benchmarks/scale.py --report runs.jsonl --out results/scale.md

`--data` is a folder for what is generated (12 GB at 10 M). Every run is a fresh process with `--workers 1`
and one line of `--found`, so that lines may be measured side by side, each on cores of its own. The process
that measures reads RssAnon of the one that works every 20 ms; mapped files are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import generate

from prerank_tools.run.heaps import share_heaps

ITEMS = 100_000  # the catalogue behind events and requests
AS_OF = generate.START + generate.DAYS * generate.DAY
QUICK = "[train.user]\nmax_events = 64\n[train.user.training]\nepochs = 1\n"
LINES = {
    "quantize sid": "quantize sid {embeddings} --codebook {codebook}",
    "export vectors": "export vectors {embeddings} --format int8",
    "gsu topk": "gsu topk --requests {requests} --events {log} --embeddings {catalogue}",
    "embed users": "embed users --events {history} --embeddings {catalogue} --model {user_model} "
    f"--as-of {AS_OF}",
    "data features": "data features --events {events} --requests {asked}",
}
MODULES = {
    "quantize sid": "prerank_tools.quantizers.stage",
    "export vectors": "prerank_tools.precision.stage",
    "gsu topk": "prerank_tools.gsu.stage",
    "embed users": "prerank_tools.users.stage",
    "data features": "prerank_tools.features.stage",
}
UNIT = {"quantize sid": "items", "export vectors": "items", "gsu topk": "pairs"}


def main() -> None:
    """Generate, measure or report, as the command line says."""
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
        return
    share_heaps()  # and so the processes that are measured, as those of the command line
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("scale_data"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lines", nargs="*", default=[], choices=list(LINES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--generate", action="store_true", help="make the inputs of --lines (all by default)")
    parser.add_argument("--extremes", action="store_true")
    parser.add_argument(
        "--found", type=Path, default=Path("runs.jsonl"), help="one JSON line a run, added to"
    )
    parser.add_argument("--report", type=Path, help="JSON lines of runs to make --out of")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.report:
        arguments.out.write_text(report([json.loads(line) for line in arguments.report.open()]))
        return
    if arguments.generate:
        prepare(arguments.data / "shared")
        for size in arguments.sizes:
            for name in arguments.lines or LINES:
                inputs(name, size, arguments.data)
        return
    for size in arguments.sizes:
        for name in arguments.lines:
            measure(name, size, arguments)
    if arguments.extremes:
        extremes(arguments)


def note(arguments: argparse.Namespace, row: dict[str, Any]) -> None:
    """Add one run to the lines found."""
    with arguments.found.open("a") as lines:
        lines.write(json.dumps({"machine": machine(), "threads": arguments.threads, **row}) + "\n")


def prerank(line: str, out: Path, *more: str) -> dict[str, Any]:
    """Run one line outside of any measurement; its JSON result."""
    device = [] if line.startswith("data ") else ["--device", "cpu"]
    command = [sys.executable, "-m", "prerank_cli", *line.split(), "-o", str(out), "--json", *device, *more]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(told.stdout)


def prepare(folder: Path) -> dict[str, Path]:
    """The catalogue, a codebook and a user model: frozen before anything is measured."""
    paths = {name: folder / name for name in ("catalogue", "codebook", "user_model", "small")}
    if not folder.exists():
        generate.embeddings(paths["catalogue"], ITEMS)
        generate.events(paths["small"], 3_000)
        (folder / "quick.toml").write_text(QUICK)
        prerank(f"train quantizer {paths['catalogue']}", paths["codebook"])
        line = f"train user --events {paths['small']} --embeddings {paths['catalogue']}"
        prerank(line, paths["user_model"], "--config", str(folder / "quick.toml"))
    return paths


def inputs(name: str, size: int, data: Path) -> dict[str, Path]:
    """Paths of a line's inputs at one size, generated when first asked for."""
    folder = data / str(size)
    own = ("embeddings", "events", "history", "log", "requests", "asked")
    paths = {**prepare(data / "shared"), **{key: folder / key for key in own}}
    users = size // generate.CANDIDATES
    makers: dict[str, Callable[[Path], object]] = {
        "embeddings": lambda to: generate.embeddings(to, size),
        "events": lambda to: generate.events(to, size),
        "requests": lambda to: generate.requests(to, size),
        "asked": lambda to: generate.requests(to, size // 5, users=size // 20),
        "history": lambda to: partitioned(to, size),
        "log": lambda to: partitioned(to, 200 * users, users=users),
    }
    for key, make in makers.items():
        if f"{{{key}}}" in LINES[name] and not paths[key].exists():
            unfinished = folder / f"making-{key}"
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(paths[key])
    return paths


def partitioned(to: Path, size: int, *, users: int = 0) -> None:
    """A log in buckets of users; for `gsu topk` of some 200 events a user that asks."""
    raw = to.with_name(to.name + "-raw")
    shutil.rmtree(raw, ignore_errors=True)
    generate.events(raw, size, users=users)
    prerank(f"data partition {raw}", to)
    shutil.rmtree(raw)


def measure(name: str, size: int, arguments: argparse.Namespace) -> None:
    """One line at one size, so many times."""
    line = LINES[name].format(**inputs(name, size, arguments.data))
    out = arguments.data / "out" / f"{name.replace(' ', '-')}-{size}"
    for _ in range(arguments.repeats):
        note(arguments, {"line": name, "size": size, **watched(line, out, arguments.threads)})
    shutil.rmtree(out)


def watched(line: str, out: Path, threads: int) -> dict[str, float]:
    """Run a line in a fresh process and watch its anonymous memory; numbers of the run by phase."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--work", *line.split(), "-o", str(out), "--workers", "1"]
    process = subprocess.Popen(
        [*command, "--threads", str(threads), "--device", "cpu"], stdout=subprocess.PIPE, text=True
    )
    seen: list[tuple[float, int]] = []
    while process.poll() is None:
        seen.append((time.monotonic(), anonymous(process.pid)))
        time.sleep(0.02)
    assert process.stdout is not None
    told = json.loads(process.stdout.read().splitlines()[-1])
    if process.returncode:
        raise SystemExit(f"{line} ended with {process.returncode}")
    manifest = json.loads((out / "manifest.json").read_text())
    files = [path for path in out.rglob("*.parquet") if path.is_file()]
    spans = told.pop("spans")
    peaks = {
        phase: max((kb for at, kb in seen if begin <= at <= end), default=0) / 1024
        for phase, (begin, end) in spans.items()
    }
    return {
        **told,
        "seconds": manifest["timing"]["seconds"],
        "shards": len(manifest["timing"]["shard_seconds"]),
        "rows_out": manifest["outputs"]["rows"],
        "bytes_out": sum(path.stat().st_size for path in files),
        "map_mb": peaks.get("map", 0),
        "reduce_mb": peaks.get("reduce", 0),
        "peak_mb": max(kb for _, kb in seen) / 1024,
    }


def anonymous(pid: int) -> int:
    """RssAnon of a process in kB, 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def work(words: list[str]) -> None:
    """In the process that is watched: run the line with clocks around reading, writing and flushing."""
    import polars as pl

    from prerank_cli.main import call
    from prerank_tools.run import commit, job, mapping, worker

    clocks: dict[str, float] = {"read": 0.0, "write": 0.0, "fsync": 0.0}
    spans: dict[str, tuple[float, float]] = {}

    def timed(owner: Any, name: str, clock: str) -> None:
        function = getattr(owner, name)

        def call_timed(*arguments: Any, **options: Any) -> Any:
            started, before = time.perf_counter(), clocks[clock]
            try:
                return function(*arguments, **options)
            finally:
                clocks[clock] = before + time.perf_counter() - started  # a call inside counts once

        setattr(owner, name, call_timed)

    def spanned(name: str, phase: str) -> None:
        function = getattr(job, name)

        def call_spanned(*arguments: Any, **options: Any) -> Any:
            started = time.monotonic()
            try:
                return function(*arguments, **options)
            finally:
                spans[phase] = (started, time.monotonic())

        setattr(job, name, call_spanned)

    timed(pl.LazyFrame, "collect", "read")
    timed(worker, "write_part", "write")
    mapping.write_part = worker.write_part
    timed(commit, "flush", "fsync")
    spanned("map_stage", "map")
    spanned("reduce_stage", "reduce")
    import_module(MODULES[" ".join(words[:2])])
    begun = cpu_seconds()
    sys.stdout, stdout = sys.stderr, sys.stdout
    code = call(words)
    sys.stdout = stdout
    print(json.dumps({"cpu": cpu_seconds() - begun, "start_cpu": begun, **clocks, "spans": spans}))
    sys.exit(code)


def cpu_seconds() -> float:
    """CPU seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def extremes(arguments: argparse.Namespace) -> None:
    """One request with 100,000 candidates, and a user with a million events."""
    import polars as pl

    shared, folder = prepare(arguments.data / "shared"), arguments.data / "extremes"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generate.events(folder / "events", 200_000, users=1_000)
    generate.requests(folder / "wide", 100_000, users=1_000, candidates=100_000)
    heavy = folder / "heavy"
    generate.events(heavy, 1_000_000, users=1_000)
    for part in heavy.iterdir():
        pl.read_parquet(part).with_columns(user_id=pl.lit(7, dtype=pl.Int64)).write_parquet(part)
    generate.requests(folder / "asked", 200, users=1)
    asked = folder / "asked/part-0000.parquet"
    pl.read_parquet(asked).with_columns(user_id=pl.lit(7, dtype=pl.Int64)).write_parquet(asked)
    wide, heavy_log = (
        {"requests": folder / "wide", "log": folder / "events"},
        {"log": heavy, "history": heavy},
    )
    lines = {
        "gsu topk, a request of 100,000 candidates": LINES["gsu topk"].format(**wide, **shared),
        "gsu topk, a user of 1,000,000 events": LINES["gsu topk"].format(
            requests=folder / "asked", **heavy_log, **shared
        ),
        "embed users, a user of 1,000,000 events": LINES["embed users"].format(**heavy_log, **shared),
        "data features, a user of 1,000,000 events": LINES["data features"].format(
            events=heavy, asked=folder / "asked"
        ),
    }
    for name, line in lines.items():
        for _ in range(arguments.repeats):
            row = watched(line, folder / "out", arguments.threads)
            note(arguments, {"line": name, "size": 0, **row})


def middles(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a line and size, in the order of the table: the medians of its runs and how many there were."""
    order = list(LINES)
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in found:
        runs.setdefault((row["line"], row["size"]), []).append(row)
    middle = [
        {
            key: median(run[key] for run in own) if isinstance(value, float | int) else value
            for key, value in own[0].items()
        }
        | {"runs": len(own), "cpu_spread": (min(run["cpu"] for run in own), max(run["cpu"] for run in own))}
        for own in runs.values()
    ]
    return sorted(
        middle, key=lambda r: (order.index(r["line"]) if r["line"] in order else len(order), r["size"])
    )


def report(found: list[dict[str, Any]]) -> str:
    """The Markdown of results/scale.md."""
    rows = middles(found)
    sized = [row for row in rows if row["size"]]
    head = HEAD.format(
        date=f"{datetime.now(UTC):%Y-%m-%d}", threads=found[0]["threads"], **found[0]["machine"]
    )
    text = [head, TABLE, *(sized_line(row) for row in sized), "", GROWTH, *growth(sized)]
    single = [row for row in rows if not row["size"]]
    if single:
        text += ["", SINGLE, *(single_line(row) for row in single)]
    return "\n".join([*text, ""])


def machine() -> dict[str, Any]:
    """What ran it."""
    names = ("torch", "polars", "numba")
    return {
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in names),
    }


def sized_line(row: dict[str, Any]) -> str:
    """One line at one size."""
    outside = [row[key] / max(row["seconds"], 1e-9) for key in ("read", "write", "fsync")]
    outside[1] -= outside[2]  # writing holds its own flushes
    cells = [
        f"{row['line']}, {row['size'] / 1e6:g} M {UNIT.get(row['line'], 'events')}",
        f"{row['runs']}",
        f"{row['seconds']:.1f}",
        f"{row['cpu']:.1f}",
        f"{1e6 * row['cpu'] / row['size']:.2f} ({row['cpu_spread'][0] / row['cpu']:.2f} to "
        f"{row['cpu_spread'][1] / row['cpu']:.2f})",
        f"{row['map_mb']:,.0f}",
        f"{row['reduce_mb']:,.0f}",
        " / ".join(f"{100 * max(share, 0):.0f} %" for share in outside),
    ]
    return "| " + " | ".join(cells) + " |"


def growth(rows: list[dict[str, Any]]) -> list[str]:
    """From the smallest size to the largest: memory and CPU a row."""
    lines = []
    for name in dict.fromkeys(row["line"] for row in rows):
        own = [row for row in rows if row["line"] == name]
        small, large = own[0], own[-1]
        if small is large:
            continue
        per_row = (large["cpu"] / large["size"]) / (small["cpu"] / small["size"])
        grown = (large["reduce_mb"] - small["reduce_mb"]) * 2**20 / (large["size"] - small["size"])
        cells = [
            name,
            f"{large['map_mb'] / small['map_mb']:.2f}",
            f"{grown:.0f}" if large["reduce_mb"] else "-",
            f"{per_row:.2f}",
            "yes" if max(row["peak_mb"] for row in own) < 2048 else "NO",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def single_line(row: dict[str, Any]) -> str:
    """One extreme."""
    numbers = f"{row['seconds']:.1f} | {row['cpu']:.1f} | {row['peak_mb']:,.0f} | {row['rows_out']:,.0f}"
    return f"| {row['line']} | {numbers} |"


def cpu() -> str:
    """The processor's name."""
    found = [text for text in Path("/proc/cpuinfo").read_text().splitlines() if text.startswith("model name")]
    return found[0].split(":", 1)[1].strip() if found else platform.processor()


HEAD = """# One process at 1 M and 10 M rows

The commands at the head of `benchmarks/scale.py`, {date}. {cpu}, each line pinned to {cores} cores
of its own, Python {python}, {versions}, seed 0. Medians of so many runs, each a fresh process
with `--workers 1 --threads {threads}`.

Items are 256-d fp16 vectors around 1,000 centres; events have Zipf users (a twentieth as many ids, one user
with 1 % of all) over 100,000 items in 30 daily parts; requests have 200 candidates, against some 200 events a
user. `gsu topk` and `embed users` read the log as `data partition` left it, `data features` as it came.
Codebook and user model are fitted before. Memory is the peak of RssAnon in each phase, the libraries' own
included; mapped files are not in it. CPU does not count imports; beside it the least and most of the runs.
"""
TABLE = """| | runs | seconds | CPU s | CPU us a row | map MB | reduce MB | read / encode, checksum / fsync |
|---|---|---|---|---|---|---|---|"""
GROWTH = """From the smallest to the largest size:

| | map memory | reduce bytes a row | CPU a row | under 2 GB |
|---|---|---|---|---|"""
SINGLE = """Extremes:

| | seconds | CPU s | peak MB | rows out |
|---|---|---|---|---|"""


if __name__ == "__main__":
    main()
