"""Encoders on one GPU: BERT-base-size text, ViT-B/16-size vision, beside the GEMM ceiling of the same run.

    python3 benchmarks/gpu_encode.py forward --out forward.json    # checks, then rates on data in GPU memory
    python3 benchmarks/gpu_encode.py text --out text.json          # `embed items`, Parquet to Parquet
    python3 benchmarks/gpu_encode.py images --out images.json
    python3 benchmarks/gpu_encode.py codes --model MINILM --items ITEMS.parquet --out codes.json
    python3 benchmarks/gpu_encode.py report *.json --out benchmarks/results/encode_gpu.md

Weights are random, drawn from the architectures' own initialisation: speed does not depend on them. FLOPs
count visible tokens only, two per multiply-add. Imports stand inside functions: the processes that decode
import this file as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

if TYPE_CHECKING:
    import numpy as np
    from gpu_encode_models import Size

    from prerank_tools.encoders.image import ImageEncoder
    from prerank_tools.encoders.text import TextEncoder

Row = dict[str, Any]


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of `work` with the device idle before and after."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def gemm_ceiling(device: str, size: Size) -> float:
    """TFLOP/s of one large bf16 product on random data."""
    import torch

    n = size.gemm
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    return 10 * 2 * n**3 / seconds(lambda: [a @ b for _ in range(10)], 5) / 1e12


def load(kind: str, folder: Path, device: str, *, threads: int = 4, **config: object) -> Any:
    """The library's own encoder of a model folder."""
    from prerank_tools.encoders.loading import EmbedConfig, load_image, load_text

    if kind == "text":
        return load_text(folder, EmbedConfig(**config), device=device)
    return load_image(folder, EmbedConfig(**config), device=device, threads=threads)


# Checks


def check(kind: str, folder: Path, size: Size, device: str) -> list[str]:
    """fp32 against plain transformers forwards, then bf16 eager and compiled against fp32."""
    inputs = sample_of(kind, size)
    exact = vectors(load(kind, folder, device, precision="fp32"), inputs)
    truth = plain_vectors(kind, folder, inputs[:16], device)
    worst = float(abs(exact[:16] - truth).max())
    assert worst < 1e-4, worst
    notes = [f"{kind}: fp32 against plain transformers, one at a time: largest difference {worst:.1e}"]
    for compiled in (False, True):
        low = vectors(load(kind, folder, device, precision="bf16", compile=compiled), inputs)
        cosine = (low * exact).sum(1)
        assert cosine.mean() > 0.999, cosine.mean()
        name = "compiled" if compiled else "eager"
        spread = f"cosine mean {cosine.mean():.6f}, min {cosine.min():.6f}"
        notes.append(f"{kind}: bf16 {name} against fp32: {spread}")
    return notes


def sample_of(kind: str, size: Size) -> list[Any]:
    from gpu_encode_models import jpegs_like, titles_like

    return titles_like(min(4_096, size.titles)) if kind == "text" else jpegs_like(256)


def vectors(encoder: TextEncoder | ImageEncoder, inputs: list[Any]) -> np.ndarray:
    found = encoder.encode(inputs)
    return found[0] if isinstance(found, tuple) else found


def plain_vectors(kind: str, folder: Path, inputs: Sequence[Any], device: str) -> np.ndarray:
    """The oracle: no batch, no padding, Pillow and transformers alone."""
    import io

    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval().to(device)
    parts = []
    with torch.inference_mode():
        for one in inputs:
            if kind == "text":
                ids = AutoTokenizer.from_pretrained(folder)(one, return_tensors="pt")["input_ids"]
                parts.append(model(input_ids=ids.to(device)).last_hidden_state[0].mean(0))
            else:
                processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
                pixels = processor(images=[Image.open(io.BytesIO(one))], return_tensors="pt")["pixel_values"]
                parts.append(model(pixel_values=pixels.to(device)).last_hidden_state[0, 0])
        return torch.nn.functional.normalize(torch.stack(parts), dim=-1).cpu().numpy()


# Rates on data in GPU memory


def forward_text(folder: Path, size: Size, device: str, **config: object) -> tuple[float, float]:
    """Titles/s and TFLOP/s of the forward passes over one shard of tokens, cut as the encoder cuts them."""
    import torch
    from gpu_encode_models import titles_like, transformer_flops

    from prerank_tools.encoders.batches import cut_batches

    encoder = load("text", folder, device, precision="bf16", **config)
    tokens = encoder._tokens(titles_like(size.titles))
    cuts = cut_batches(tokens.lengths_N, budget=encoder.budget, shape=encoder.shape)
    made = [encoder._tensors(tokens, cut) for cut in cuts]
    batches = [(ids.to(device), None if mask is None else mask.to(device)) for _, ids, mask in made]

    def whole() -> None:
        for ids, mask in batches:
            encoder.forward(ids, mask)

    whole()  # compiles
    with torch.inference_mode():
        spent = seconds(whole, size.repeats)
    return size.titles / spent, transformer_flops(size, tokens.lengths_N) / spent / 1e12


def forward_images(folder: Path, size: Size, device: str, **config: object) -> tuple[float, float]:
    """Images/s and TFLOP/s of the forward pass, from the bytes of cut pictures on."""
    import torch
    from gpu_encode_models import image_flops

    encoder = load("images", folder, device, precision="bf16", **config)
    shape = (encoder.batch, size.pixels, size.pixels, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    rounds = 16
    encoder.forward(pixels)
    spent = seconds(lambda: [encoder.forward(pixels) for _ in range(rounds)], size.repeats)
    images = rounds * encoder.batch
    return images / spent, image_flops(size) * images / spent / 1e12


def called(kind: str, folder: Path, inputs: list[Any], device: str, threads: int, repeats: int) -> float:
    """Rows/s of the encoder in one process, called on strings or JPEG bytes that are in memory."""
    from prerank_tools.run.threads import fix_threads

    fix_threads(threads)
    encoder = load(kind, folder, device, threads=threads, precision="bf16", compile=device == "cuda")
    encoder.encode(inputs)  # compiles, starts what decodes, learns the words
    return len(inputs) / seconds(lambda: encoder.encode(inputs), repeats)


FORWARD = {"text": forward_text, "images": forward_images}
UNIT = {"text": "titles", "images": "images"}


def run_forward(size: Size, device: str, folder: Path) -> dict[str, Any]:
    """Checks, the ceiling, then every variant."""
    found: dict[str, Any] = {"rows": [], "notes": []}
    made = {kind: model_of(kind, size, folder) for kind in FORWARD}
    for kind, model in made.items():
        found["notes"] += check(kind, model, size, device)
        print(*found["notes"][-3:], sep="\n", flush=True)
    found["ceiling"] = gemm_ceiling(device, size)
    variants: Row = {"eager": {}, "compiled": {"compile": True}}
    for kind, model in made.items():
        for name, config in {**variants, **({"exact_batches": {"exact_batches": True}})}.items():
            rate, tflops = FORWARD[kind](model, size, device, **config)
            row = {"what": f"{UNIT[kind]}, forward, {name}", "rate": rate, "tflops": tflops}
            found["rows"].append(say(row))
    return found


def model_of(kind: str, size: Size, folder: Path) -> Path:
    from gpu_encode_models import image_folder, text_folder

    return (text_folder if kind == "text" else image_folder)(size, folder / f"model-{kind}")


# End to end, Parquet to Parquet


def run_end_to_end(
    kind: str,
    size: Size,
    device: str,
    folder: Path,
    plans: Sequence[tuple[int, int]],
    memory: float | None,
) -> dict[str, Any]:
    """`embed items` at several (workers, threads), against the rate in memory of the same call."""
    from gpu_encode_models import jpegs_like, titles_like, write_table

    model = model_of(kind, size, folder)
    found: dict[str, Any] = {"rows": [], "notes": [], "ceiling": gemm_ceiling(device, size)}
    if memory is None:
        memory, tflops = FORWARD[kind](model, size, device, compile=True)
        row = {"what": f"{UNIT[kind]}, forward, compiled", "rate": memory, "tflops": tflops}
        found["rows"].append(say(row))
    inputs: list[Any] = titles_like(size.titles) if kind == "text" else jpegs_like(size.jpegs)
    cores = len(os.sched_getaffinity(0))
    alone = called(kind, model, inputs, device, cores, size.repeats)
    row = {"what": f"{UNIT[kind]}, one process called on them in memory, {cores} threads", "rate": alone}
    found["rows"].append(say({**row, "share": alone / memory}))
    column, shards = ("title", size.text_shards) if kind == "text" else ("image", size.image_shards)
    items = write_table(folder / "items", column, inputs, shards)
    for workers, threads in plans:
        out = folder / f"out-{workers}-{threads}"
        rate, whole = embed(kind, items, model, device, out, workers, threads)
        shutil.rmtree(out)
        print(f"{workers} x {threads}: {whole:.1f} s in all", flush=True)
        name = f"{UNIT[kind]}, Parquet to Parquet, --workers {workers} --threads {threads}"
        shares = {"share": rate / memory, "alone": rate / alone}
        found["rows"].append(say({"what": name, "rate": rate, **shares, "whole": whole}))
    return found


def embed(
    kind: str, items: Path, model: Path, device: str, out: Path, workers: int, threads: int
) -> tuple[float, float]:
    """Rows/s while all workers are busy with a warm model, and seconds of the whole job, loading included."""
    from prerank_tools.encoders.loading import EmbedConfig
    from prerank_tools.encoders.stage import EmbedItems
    from prerank_tools.run.job import RunOptions, run

    done: list[tuple[float, int]] = []

    def progress(count: int, total: int, record: Any) -> None:
        if record:
            done.append((time.perf_counter(), record["rows"]))
            print(f"{workers} x {threads}: shard {len(done)} at {done[-1][0] - start:.2f} s", flush=True)

    config = EmbedConfig(precision="bf16", compile=device == "cuda")
    named = {"model": str(model)} if kind == "text" else {"image_model": str(model), "modalities": "image"}
    start = time.perf_counter()
    run(
        EmbedItems(items, dtype="fp16", config=config, **named),  # type: ignore[arg-type]
        out,
        RunOptions(workers=workers, threads=threads, device=device, overwrite=True, progress=progress),
    )
    whole = time.perf_counter() - start
    ends = min(workers, (len(done) - 1) // 2)  # shards at either end, where some worker may be idle
    (began, _), *warm = done[ends - 1 : len(done) - ends + 1] if ends > 1 else done
    return sum(rows for _, rows in warm) / (warm[-1][0] - began), whole


# Semantic IDs: CPU against GPU, fp32 against bf16


def run_codes(model: Path, items: Path, device: str, count: int) -> dict[str, Any]:
    """Codes of real titles under codebooks fitted on the CPU's fp32 vectors."""
    import polars as pl
    from codes import residual_codes

    titles = pl.read_parquet(items)["title"].drop_nulls().unique(maintain_order=True).head(count).to_list()
    combos = [("cpu", "fp32"), ("cpu", "bf16"), (device, "fp32"), (device, "bf16")]
    x = {combo: load("text", model, combo[0], precision=combo[1]).encode(titles) for combo in combos}
    truth = x[combos[0]]
    found: dict[str, Any] = {"codes": [], "notes": [], "titles": len(titles)}
    for combo in combos[1:]:
        codes, other = residual_codes(truth, x[combo])
        same, cosine = codes == other, (truth * x[combo]).sum(1)
        row = {
            "what": f"{combo[0]} {combo[1]}",
            "full": float(same.all(1).mean()),
            "first": float(same[:, 0].mean()),
            "mean": float(cosine.mean()),
            "min": float(cosine.min()),
            "largest": float(abs(truth - x[combo]).max()),
        }
        found["codes"].append(say(row))
    return found


# The command line


def say(row: Row) -> Row:
    print(
        " ".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True
    )
    return row


def where(device: str) -> Row:
    """The card, the processor and the versions."""
    import torch
    import transformers
    from PIL import Image

    from prerank_tools.run.manifest import cpu_model

    return {
        "card": torch.cuda.get_device_name() if device == "cuda" else "no GPU",
        "cpu": f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Pillow {Image.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }


def pairs(text: str) -> list[tuple[int, int]]:
    """`2x7,4x3`: workers x threads."""
    return [(int(plan.split("x")[0]), int(plan.split("x")[1])) for plan in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("forward", "text", "images", "codes", "report"))
    parser.add_argument("found", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models: does the script run?")
    parser.add_argument("--plans", type=pairs, default=pairs("1x8"), help="workers x threads, as 2x7,4x3")
    parser.add_argument("--shards", type=int, help="of the table, in place of 48 (text) and 32 (images)")
    parser.add_argument("--memory", type=float, help="rate in memory of a run before, not measured again")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--items", type=Path)
    parser.add_argument("--titles", type=int, default=12_000, help="real titles whose codes are compared")
    args = parser.parse_args()
    if args.part == "report":
        from gpu_encode_page import report

        args.out.write_text(report([json.loads(path.read_text()) for path in args.found]))
        return
    from gpu_encode_models import SMALL, Size

    size = SMALL if args.small else Size()
    if args.shards:
        size = replace(size, text_shards=args.shards, image_shards=args.shards)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        if args.part == "forward":
            found = run_forward(size, args.device, Path(name))
        elif args.part == "codes":
            found = run_codes(args.model, args.items, args.device, args.titles)
        else:
            found = run_end_to_end(args.part, size, args.device, Path(name), args.plans, args.memory)
    args.out.write_text(json.dumps({"name": args.part, "where": where(args.device), **found}))


if __name__ == "__main__":
    main()
