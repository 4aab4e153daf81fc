"""Partition generated logs by user: seconds, peak anonymous memory, and what appending one day touches.

    python benchmarks/partition.py --data FOLDER --rows 1000000 10000000 100000000 --out results/partition.md

`--data` is a folder for what is generated and sorted (about 100 bytes an event); it is emptied afterwards.
Users are Zipf distributed, and one user has a hundredth of all events. Each size is one fresh process a run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import polars as pl

DAYS = 30
START = 1_700_000_000
PEER = Path(__file__).parent / "peers" / "partition.py"


def main() -> None:
    """Generate, partition, append a day, run the peer, write the table."""
    arguments = parse()
    rows = [measure(arguments.data / f"{size}", size, arguments) for size in arguments.rows]
    arguments.out.write_text(report(rows, arguments))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000, 100_000_000])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer-rows", type=int, default=100_000_000, help="largest size for the peer")
    return parser.parse_args()


def measure(folder: Path, size: int, arguments: argparse.Namespace) -> dict[str, object]:
    """One size: every number of its row of the table."""
    shutil.rmtree(folder, ignore_errors=True)
    generate(folder / "log", size, seed=arguments.seed)
    prerank = [str(Path(sys.executable).parent / "prerank"), "data", "partition"]
    one = ["--workers", "1", "--threads", "2", "--json"]
    whole = watched([*prerank, str(folder / "log"), "-o", str(folder / "whole"), *one])
    earlier = folder / "whole"
    inodes = {part.stat().st_ino for part in (earlier / "data").iterdir()}
    day = folder / "day.parquet"
    events(size // DAYS, size, np.random.default_rng(arguments.seed + 1), day=DAYS).write_parquet(day)
    appended = watched([*prerank, str(day), "--append-to", str(earlier), "-o", str(folder / "next"), *one])
    parts = list((folder / "next" / "data").glob("part-*.parquet"))
    fresh = [part.stat().st_size for part in parts if part.stat().st_ino not in inodes]
    peer: dict[str, float] = {}
    if size <= arguments.peer_rows:
        peer = watched(
            [sys.executable, str(PEER), str(folder / "log"), str(folder / "peer"), str(len(parts) // 2)]
        )
    found = {
        "rows": size,
        "parts": len(parts) // 2,
        "bytes_log": sum(part.stat().st_size for part in (folder / "log").iterdir()),
        "bytes_out": sum(part.stat().st_size for part in (earlier / "data").iterdir()),
        "whole": whole,
        "appended": appended,
        "bytes_day": day.stat().st_size,
        "bytes_appended": sum(fresh),
        "parts_appended": len(fresh),
        "peer": peer,
        "checked": check(folder / "whole", folder / "log"),
    }
    print(json.dumps(found), flush=True)
    shutil.rmtree(folder)
    return found


def generate(folder: Path, size: int, *, seed: int) -> None:
    """A log of `size` events as daily parts."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for day in range(DAYS):
        events(size // DAYS, size, rng, day=day).write_parquet(folder / f"day-{day:02d}.parquet")


def events(rows: int, size: int, rng: np.random.Generator, *, day: int) -> pl.DataFrame:
    """One day: Zipf users and items, 1 % of the events by one user, 2 % ingested up to two days late."""
    users, items = max(10, size // 20), max(10, size // 100)
    user_n = zipf(rows, users, rng)
    user_n[rng.random(rows) < 0.01] = users
    time_n = START + day * 86_400 + rng.integers(0, 86_400, rows)
    late_n = np.where(rng.random(rows) < 0.02, rng.integers(0, 2 * 86_400, rows), 0)
    return pl.DataFrame(
        {
            "user_id": user_n,
            "item_id": zipf(rows, items, rng),
            "timestamp": time_n,
            "ingested_at": time_n + late_n,
            "action": pl.Series(np.array(["click", "purchase"])[(rng.random(rows) < 0.1).astype(int)]),
            "value": rng.random(rows).astype(np.float32),
        }
    )


def zipf(rows: int, ids: int, rng: np.random.Generator, *, exponent: float = 0.8) -> np.ndarray:
    """Ranks 0 .. ids-1 with P(rank) falling as rank^-exponent, as scattered ids."""
    rank_n = (ids * rng.random(rows) ** (1 / (1 - exponent))).astype(np.int64)
    return (rank_n * 2_654_435_761) % ids


def watched(command: list[str]) -> dict[str, float]:
    """Seconds, CPU seconds and peak anonymous memory (MB) of a command and its children."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(anonymous(pid) for pid in family(process.pid)))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {"seconds": round(time.perf_counter() - started, 1), "anonymous_mb": round(peak / 1024)}


def anonymous(pid: int) -> int:
    """RssAnon of a process in kB, 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def family(pid: int) -> list[int]:
    """A process and its children."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(one for child in children for one in family(int(child)))]


def check(out: Path, log: Path) -> bool:
    """Every part holds one bucket of users in order, and no row is lost."""
    from prerank_tools.tables.bucketing import bucket_of

    parts = sorted((out / "data").glob("part-*.parquet"))
    rows = 0
    for bucket, part in enumerate(parts):
        frame = pl.read_parquet(part, columns=["user_id", "timestamp", "item_id"])
        rows += len(frame)
        keys = frame.select(key=pl.struct("user_id", "timestamp", "item_id"))["key"]
        if len(frame) and not (
            keys.is_sorted() and (bucket_of(frame["user_id"].unique(), len(parts)) == bucket).all()
        ):
            return False
    return rows == pl.scan_parquet(log / "*.parquet").select(pl.len()).collect().item()


def report(rows: list[dict[str, object]], arguments: argparse.Namespace) -> str:
    """The Markdown of results/partition.md."""
    return "\n".join(
        [
            HEAD.format(
                command=" ".join(["python", *sys.argv]).replace(str(arguments.data), "FOLDER"),
                date=f"{datetime.now(UTC):%Y-%m-%d}",
                cpu=cpu(),
                cores=os.cpu_count(),
                python=platform.python_version(),
                polars=metadata.version("polars"),
                duckdb=metadata.version("duckdb"),
                seed=arguments.seed,
                header="| " + " | ".join(COLUMNS) + " |",
                rule="|---" * len(COLUMNS) + "|",
            ),
            *map(line, rows),
            "",
        ]
    )


def cpu() -> str:
    """The processor's name."""
    found = [text for text in Path("/proc/cpuinfo").read_text().splitlines() if text.startswith("model name")]
    return found[0].split(":", 1)[1].strip() if found else platform.processor()


def line(row: dict[str, object]) -> str:
    """One size as a row of the table."""
    whole, day, peer = row["whole"], row["appended"], row["peer"]
    assert isinstance(whole, dict) and isinstance(day, dict) and isinstance(peer, dict)
    cells = [
        f"{row['rows']:,}",
        row["parts"],
        f"{row['bytes_log'] / 1e6:,.0f} / {row['bytes_out'] / 1e6:,.0f}",  # type: ignore[operator]
        whole["seconds"],
        f"{row['rows'] / whole['seconds'] / 1e6:.2f}",  # type: ignore[operator]
        whole["anonymous_mb"],
        day["seconds"],
        day["anonymous_mb"],
        f"{row['bytes_day'] / 1e6:,.1f} / {row['bytes_appended'] / 1e6:,.1f}",  # type: ignore[operator]
        f"{peer['seconds']} / {peer['anonymous_mb']}" if peer else "-",
        "yes" if row["checked"] else "NO",
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


HEAD = """# Partition a log by user

`{command}`, {date}. {cpu}, {cores} cores, Python {python}, polars {polars}, duckdb {duckdb}, seed {seed}.

Generated events (user_id, item_id, timestamp, ingested_at, action, value) in 30 daily parts; users Zipf with
exponent 0.8 over a twentieth as many ids as events, and one user with 1 % of all events.
`prerank data partition LOG -o OUT --workers 1 --threads 2`, the number of buckets chosen by the rows; then
one day more with `--append-to`. Memory is the peak of RssAnon over the process and its children, seen every
50 ms: mapped files are not in it. The peer is DuckDB, an external sort into as many hive folders within 2 GB.
Checked: every part holds one bucket, sorted by (user, time, item), and no row is lost. Other work shared the
cores: trust the ratios.

{header}
{rule}"""

COLUMNS = (
    "events",
    "buckets",
    "MB in / out",
    "seconds",
    "M events/s",
    "anon MB",
    "day: seconds",
    "day: anon MB",
    "day: MB in / written",
    "DuckDB seconds / anon MB",
    "checked",
)


if __name__ == "__main__":
    main()
