"""Stages at 1 M and 10 M rows in one process: peak anonymous memory, CPU a row, time outside of compute.

    python benchmarks/scale.py --data FOLDER --sizes 1000000 10000000 --repeats 5 --out results/scale.md

`--data` is a folder for what is generated (5 GB at 10 M items); it is emptied afterwards. Every run is a
fresh process with `--workers 1`. The process that measures reads RssAnon of the one that works every 20 ms;
mapped files are not in it.
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
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import generate

ITEMS = 100_000  # the catalogue behind events and requests
AS_OF = generate.START + generate.DAYS * generate.DAY
QUICK = "[train.user]\nmax_events = 64\n[train.user.training]\nepochs = 1\n"
LINES = {
    "quantize sid": "quantize sid {embeddings} --codebook {codebook}",
    "export vectors": "export vectors {embeddings} --format int8",
    "gsu topk": "gsu topk --requests {requests} --events {log} --embeddings {catalogue}",
    "embed users": "embed users --events {events} --embeddings {catalogue} --model {user_model} "
    f"--as-of {AS_OF}",
    "data features": "data features --events {events} --requests {asked}",
}
UNIT = {"quantize sid": "items", "export vectors": "items", "gsu topk": "pairs"}


def main() -> None:
    """Generate, run every line at every size, then the two extremes, and write the table."""
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lines", nargs="+", default=list(LINES), choices=list(LINES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--found", type=Path, help="JSON lines of earlier runs to report as well; added to")
    arguments = parser.parse_args()
    arguments.data.mkdir(parents=True, exist_ok=True)
    shared = prepare(arguments.data / "shared")
    found = [json.loads(line) for line in arguments.found.open()] if _exists(arguments.found) else []
    for size in arguments.sizes:
        for name in arguments.lines:
            row = measure(name, size, shared, arguments)
            found.append(row)
            print(json.dumps(row), flush=True)
            if arguments.found:
                with arguments.found.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
            arguments.out.write_text(report(found, arguments))
        shutil.rmtree(arguments.data / str(size), ignore_errors=True)
    if arguments.lines == list(LINES):
        found += extremes(arguments.data / "extremes", shared, arguments)
    arguments.out.write_text(report(found, arguments))
    shutil.rmtree(arguments.data)


def _exists(path: Path | None) -> bool:
    return path is not None and path.exists()


def prerank(line: str, out: Path, *more: str) -> dict[str, Any]:
    """Run one line outside of any measurement; its JSON result."""
    command = [sys.executable, "-m", "prerank_cli", *line.split(), "-o", str(out), "--json", *more]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
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


def inputs(name: str, size: int, folder: Path, shared: dict[str, Path]) -> dict[str, Path]:
    """Paths of a line's inputs at one size, generated when first asked for."""
    paths = {**shared, **{key: folder / key for key in ("embeddings", "events", "log", "requests", "asked")}}
    makers: dict[str, Callable[[], object]] = {
        "embeddings": lambda: generate.embeddings(paths["embeddings"], size),
        "events": lambda: generate.events(paths["events"], size),
        "requests": lambda: generate.requests(paths["requests"], size),
        "asked": lambda: generate.requests(paths["asked"], size // 5, users=size // 20),
        "log": lambda: partitioned(folder, size),
    }
    for key, make in makers.items():
        if f"{{{key}}}" in LINES[name] and not paths[key].exists():
            make()
    return paths


def partitioned(folder: Path, size: int) -> None:
    """A log with some 200 events a user that asks, in buckets of users."""
    users = size // generate.CANDIDATES
    generate.events(folder / "raw", 200 * users, users=users)
    prerank(f"data partition {folder / 'raw'}", folder / "log")
    shutil.rmtree(folder / "raw")


def measure(name: str, size: int, shared: dict[str, Path], arguments: argparse.Namespace) -> dict[str, Any]:
    """One line at one size: what the dry run says, then the median of the repeats."""
    folder = arguments.data / str(size)
    line = LINES[name].format(**inputs(name, size, folder, shared))
    planned = prerank(line, folder / "planned", "--dry-run", "--workers", "1")
    runs = [watched(line, folder / "out", arguments.threads) for _ in range(arguments.repeats)]
    middle = {key: median(run[key] for run in runs) for key in runs[0]}
    return {"line": name, "unit": UNIT.get(name, "events"), "size": size, "planned": planned, **middle}


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
    from prerank_tools.run import commit, job, worker

    clocks: dict[str, float] = {"read": 0.0, "write": 0.0, "fsync": 0.0}
    spans: dict[str, tuple[float, float]] = {}

    def timed(owner: Any, name: str, clock: str) -> None:
        function = getattr(owner, name)

        def call_timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                clocks[clock] += time.perf_counter() - started

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
    job.write_part = worker.write_part
    timed(commit, "flush", "fsync")
    spanned("_map", "map")
    spanned("_reduce", "reduce")
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


def extremes(folder: Path, shared: dict[str, Path], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One request with 100,000 candidates, and a user with a million events: both through `gsu topk`."""
    import polars as pl

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
    lines = {
        "gsu topk, a request of 100,000 candidates": LINES["gsu topk"].format(
            requests=folder / "wide", log=folder / "events", **shared
        ),
        "gsu topk, a user of 1,000,000 events": LINES["gsu topk"].format(
            requests=folder / "asked", log=heavy, **shared
        ),
        "embed users, a user of 1,000,000 events": LINES["embed users"].format(events=heavy, **shared),
    }
    found = []
    for name, line in lines.items():
        row = {"line": name, "unit": "", "size": 0, "planned": {}, **watched(line, folder / "out", 2)}
        print(json.dumps(row), flush=True)
        found.append(row)
    return found


def report(found: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """The Markdown of results/scale.md."""
    sized = sorted(
        (row for row in found if row["size"]), key=lambda r: (list(LINES).index(r["line"]), r["size"])
    )
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", "polars", "faiss-cpu", "numba")
    )
    head = HEAD.format(
        command=" ".join(["python", *sys.argv]).replace(f"{arguments.data}", "FOLDER"),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        cpu=cpu(),
        cores=os.cpu_count(),
        python=platform.python_version(),
        versions=versions,
        repeats=arguments.repeats,
        load=os.getloadavg()[1],
    )
    text = [head, TABLE, *(sized_line(row) for row in sized), "", GROWTH, *growth(sized), "", PLANNED]
    text += [planned_line(row) for row in sized]
    single = [row for row in found if not row["size"]]
    if single:
        text += ["", SINGLE, *(single_line(row) for row in single)]
    return "\n".join([*text, ""])


def sized_line(row: dict[str, Any]) -> str:
    """One line at one size."""
    outside = [row[key] / max(row["seconds"], 1e-9) for key in ("read", "write", "fsync")]
    outside[1] -= outside[2]  # writing holds its own flushes
    cells = [
        f"{row['line']}, {row['size'] / 1e6:g} M {row['unit']}",
        f"{row['seconds']:.1f}",
        f"{row['cpu']:.1f}",
        f"{1e6 * row['cpu'] / row['size']:.2f}",
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


def planned_line(row: dict[str, Any]) -> str:
    """What the dry run said beside what happened."""
    said = row["planned"]
    pairs = (
        ("shards", said.get("shards"), row["shards"]),
        ("bytes_out", said.get("bytes_out"), row["bytes_out"]),
        ("memory_bytes", said.get("memory_bytes"), row["peak_mb"] * 2**20),
    )
    cells = [
        "-" if planned is None else f"{planned:,.0f} / {happened:,.0f} ({planned / max(happened, 1):.2f})"
        for _, planned, happened in pairs
    ]
    return f"| {row['line']}, {row['size'] / 1e6:g} M | " + " | ".join(cells) + " |"


def single_line(row: dict[str, Any]) -> str:
    """One extreme."""
    numbers = f"{row['seconds']:.1f} | {row['cpu']:.1f} | {row['peak_mb']:,.0f} | {row['rows_out']:,.0f}"
    return f"| {row['line']} | {numbers} |"


def cpu() -> str:
    """The processor's name."""
    found = [text for text in Path("/proc/cpuinfo").read_text().splitlines() if text.startswith("model name")]
    return found[0].split(":", 1)[1].strip() if found else platform.processor()


HEAD = """# One process at 1 M and 10 M rows

`{command}`, {date}. {cpu}, {cores} cores (load {load:.0f} from other work: trust CPU seconds and ratios, not
seconds), Python {python}, {versions}, seed 0. Medians of {repeats} runs, each a fresh process with
`--workers 1 --threads 2`.

Items are 256-d fp16 vectors around 1,000 centres; events have Zipf users (a twentieth as many ids, one user
with 1 % of all) over 100,000 items in 30 daily parts; requests have 200 candidates, against some 200 events a
user that `data partition` put in buckets. Codebook and user model are fitted before. Memory is the peak of
RssAnon in each phase, the libraries' own included; mapped files are not in it. CPU does not count the start.
"""
TABLE = """| | seconds | CPU s | CPU us a row | map MB | reduce MB | read / encode and checksum / fsync |
|---|---|---|---|---|---|---|"""
GROWTH = """From the smallest to the largest size:

| | map memory | reduce bytes a row | CPU a row | under 2 GB |
|---|---|---|---|---|"""
PLANNED = """`--dry-run` beside what happened (planned / happened, ratio); `-` where the dry run does not say:

| | shards | bytes out | memory |
|---|---|---|---|"""
SINGLE = """Extremes:

| | seconds | CPU s | peak MB | rows out |
|---|---|---|---|---|"""


if __name__ == "__main__":
    main()
