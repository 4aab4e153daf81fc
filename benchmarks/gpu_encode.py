"""Encoders on one GPU: BERT-base-size text, ViT-B/16-size vision, beside the GEMM ceiling of the run.

    python3 benchmarks/gpu_encode.py --out $OUT/encode_gpu.md

Weights are random, drawn from the architectures' own initialisation: speed does not depend on them. First
the encoders are checked against plain fp32 forwards, then timed on tokens and pixels that already lie on the
GPU, then end to end from Parquet to Parquet. FLOPs count visible tokens only, two per multiply-add.
"""

from __future__ import annotations

import argparse
import io
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.multiprocessing as mp
import transformers
from PIL import Image
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from prerank_tools.encoders.batches import Tokens, cut_batches, fill_batch
from prerank_tools.encoders.image import ImageEncoder, ImageTower
from prerank_tools.encoders.text import TextEncoder, TextTower, Tokenizer

VOCABULARY = 30_522
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@dataclass(frozen=True)
class Size:
    """What is built and how much is measured."""

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    pixels: int = 224
    titles: int = 524_288
    shard: int = 65_536
    images: int = 4_096
    jpegs: int = 4_096
    repeats: int = 5
    gemm: int = 8192


SMALL = Size(64, 2, 4, 64, 2_048, 512, 64, 64, 2, 512)


def build_text(
    size: Size, device: str, *, precision: str, compiled: bool = False, budget: int = 4096
) -> TextEncoder:
    """A BERT of the given size behind the library's own encoder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
    )
    tower = TextTower(BertModel(config, add_pooling_layer=False), "mean", dim=size.hidden)
    tokenizer = Tokenizer(word_pieces(), pad_id=0, max_tokens=512)
    return TextEncoder(
        tower, tokenizer, token_budget=budget, precision=precision, compiled=compiled, device=device
    )


def word_pieces() -> Callable[..., list[list[int]]]:
    """A WordPiece tokeniser with BERT's normaliser over a made-up vocabulary of BERT's size."""
    words = [*SPECIAL, *(f"w{n}" for n in range(VOCABULARY - len(SPECIAL)))]
    inner = FastTokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )

    def ids_of(texts: list[str], *, max_tokens: int) -> list[list[int]]:
        inner.enable_truncation(max_tokens)
        return [encoding.ids for encoding in inner.encode_batch_fast(list(texts))]

    return ids_of


def titles_like(count: int) -> list[str]:
    """Titles of 3 to 40 words, 12 tokens on average with [CLS] and [SEP]: a long tail, as in catalogues."""
    rng = np.random.default_rng(0)
    words_N = np.clip(np.rint(rng.gamma(6.0, 10 / 6.0, count)), 3, 40).astype(int)
    drawn = rng.integers(0, VOCABULARY - len(SPECIAL), words_N.sum())
    ends = np.cumsum(words_N)
    return [" ".join(f"w{w}" for w in drawn[end - n : end]) for n, end in zip(words_N, ends, strict=True)]


def build_vision(
    size: Size, device: str, *, precision: str, compiled: bool = False, batch: int = 32
) -> ImageEncoder:
    """A ViT with 16 x 16 patches behind the library's own encoder."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        image_size=size.pixels,
        patch_size=16,
    )
    tower = ImageTower(ViTModel(config, add_pooling_layer=False), "cls", dim=size.hidden)

    def pixels_of(pictures: list[Image.Image]) -> np.ndarray:
        small = [picture.resize((size.pixels, size.pixels), Image.Resampling.BICUBIC) for picture in pictures]
        return np.stack([np.asarray(p, np.float32).transpose(2, 0, 1) / 127.5 - 1 for p in small])

    return ImageEncoder(
        tower, pixels_of, batch=batch, precision=precision, compiled=compiled, device=device, threads=16
    )


def transformer_flops(size: Size, lengths_N: np.ndarray) -> float:
    """Products of all layers: 24 S H^2 for the weights and 4 S^2 H for attention, a layer and a sequence."""
    s = lengths_N.astype(np.float64)
    return float(size.layers * (24 * s * size.hidden**2 + 4 * s**2 * size.hidden).sum())


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of `work` with the device idle before and after."""
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gemm_ceiling(device: str, size: Size) -> float:
    """TFLOP/s of one large bf16 product on random data."""
    n = size.gemm
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b

    def ten() -> None:
        for _ in range(10):
            a @ b

    return 10 * 2 * n**3 / seconds(ten, 3) / 1e12


# Checks


@torch.inference_mode()
def check_text(size: Size, device: str, budget: int) -> str:
    """fp32 against single unpadded forwards; compiled bf16 against fp32."""
    titles = titles_like(2_048 if size is not SMALL else 64)
    exact = build_text(size, device, precision="fp32")
    x_NT = exact.encode(titles)
    ids = exact.tokenizer.ids_of(titles[:16], max_tokens=512)
    plain = [exact.tower.model(input_ids=torch.tensor([i], device=device)).last_hidden_state for i in ids]
    y_NT = torch.stack([torch.nn.functional.normalize(h[0].mean(0), dim=0) for h in plain]).cpu().numpy()
    worst = float(np.abs(x_NT[:16] - y_NT).max())
    low = build_text(size, device, precision="bf16", compiled=device == "cuda", budget=budget).encode(titles)
    cosine_N = (low * x_NT).sum(1)
    assert worst < 1e-4, worst
    assert cosine_N.mean() > 0.999, cosine_N.mean()
    return (
        f"text: fp32 against one-by-one forwards: largest difference {worst:.1e}; "
        f"bf16 against fp32: cosine mean {cosine_N.mean():.6f}, min {cosine_N.min():.6f}"
    )


@torch.inference_mode()
def check_vision(size: Size, device: str) -> str:
    """The same for images, on random pixels."""
    pixels = torch.randn(32, 3, size.pixels, size.pixels, generator=torch.Generator().manual_seed(1))
    exact = build_vision(size, device, precision="fp32")
    x_NI = exact.forward(pixels)
    plain = exact.tower.model(pixel_values=pixels[:4].to(device)).last_hidden_state[:, 0]
    worst = float((x_NI[:4] - torch.nn.functional.normalize(plain, dim=-1)).abs().max())
    low = build_vision(size, device, precision="bf16", compiled=device == "cuda").forward(pixels)
    cosine_N = (low * x_NI).sum(1)
    assert worst < 1e-4, worst
    assert cosine_N.mean() > 0.999, cosine_N.mean()
    return (
        f"vision: fp32 against a plain forward: largest difference {worst:.1e}; "
        f"bf16 against fp32: cosine mean {cosine_N.mean():.6f}, min {cosine_N.min():.6f}"
    )


# Timings on data in GPU memory


@torch.inference_mode()
def time_text(size: Size, device: str) -> list[dict[str, object]]:
    """Titles/s by batch shape, compiler and token budget."""
    base = build_text(size, device, precision="bf16")
    tokens = Tokens.of(base.tokenizer.ids_of(titles_like(size.titles), max_tokens=512))
    work = transformer_flops(size, tokens.lengths_N)
    rows = []
    for name, shape, compiled, budget in (
        ("sorted, padded, eager", "sorted", False, 32_768),
        ("uniform lengths, eager", "uniform", False, 32_768),
        ("uniform lengths, compiled", "uniform", True, 32_768),
        ("uniform lengths, compiled", "uniform", True, 131_072),
        ("exact batches, compiled", "exact", True, 32_768),
    ):
        encoder = build_text(size, device, precision="bf16", compiled=compiled and device == "cuda")
        batches = []
        for start in range(0, size.titles, size.shard):  # windows as the encoder cuts them
            window = tokens.lengths_N[start : start + size.shard]
            for batch in cut_batches(window, budget=budget, shape=shape):
                moved = replace(batch, rows=batch.rows + start)
                ids, mask = (torch.from_numpy(x).to(device) for x in fill_batch(tokens, moved, pad_id=0))
                batches.append((ids, None if shape == "uniform" else mask))

        def all_batches(encoder: TextEncoder = encoder, batches: list = batches) -> None:
            for ids, mask in batches:
                encoder.forward(ids, mask)

        all_batches()  # compiles
        spent = seconds(all_batches, size.repeats)
        rows.append(
            {
                "what": f"titles, {name}, {budget} tokens a batch",
                "rate": size.titles / spent,
                "tflops": work / spent / 1e12,
            }
        )
        say(rows[-1])
    return rows


@torch.inference_mode()
def time_vision(size: Size, device: str) -> list[dict[str, object]]:
    """Images/s by compiler and batch."""
    patches = (size.pixels // 16) ** 2
    work = transformer_flops(size, np.array([patches + 1])) + 2 * patches * 768 * size.hidden
    rows = []
    for compiled, batch in ((False, 256), (True, 256), (True, 512)):
        encoder = build_vision(size, device, precision="bf16", compiled=compiled and device == "cuda")
        pixels = torch.randn(batch, 3, size.pixels, size.pixels, device=device, dtype=encoder.dtype)
        rounds = max(1, size.images // batch)

        def all_batches(
            encoder: ImageEncoder = encoder, pixels: torch.Tensor = pixels, n: int = rounds
        ) -> None:
            for _ in range(n):
                encoder.forward(pixels)

        all_batches()
        spent = seconds(all_batches, size.repeats)
        rows.append(
            {
                "what": f"images, {'compiled' if compiled else 'eager'}, {batch} a batch",
                "rate": rounds * batch / spent,
                "tflops": work * rounds * batch / spent / 1e12,
            }
        )
        say(rows[-1])
    return rows


# End to end, Parquet to Parquet


def write_titles(size: Size, folder: Path) -> None:
    titles = titles_like(size.titles)
    for start in range(0, size.titles, size.shard):
        ids = list(range(start, start + size.shard))
        table = pa.table({"item_id": ids, "title": titles[start : start + size.shard]})
        pq.write_table(table, folder / f"part-{start // size.shard:05d}.parquet")


def write_jpegs(size: Size, folder: Path) -> None:
    """Smooth random pictures of 256 x 256: about 10 kB each, as product thumbnails are."""
    rng = np.random.default_rng(0)
    data = []
    for _ in range(256):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        data.append(buffer.getvalue())
    images = [data[n % 256] for n in range(size.jpegs)]
    for part in range(4):
        mine = list(range(part, size.jpegs, 4))
        table = pa.table({"item_id": mine, "image": [images[n] for n in mine]})
        pq.write_table(table, folder / f"part-{part:05d}.parquet")


def embed_part(encoder: TextEncoder | ImageEncoder, part: Path, to: Path) -> None:
    """Read, encode, write one shard as fp16 vectors."""
    table = pq.read_table(part)
    if "title" in table.column_names:
        x_ND = encoder.encode(table["title"].to_pylist())
    else:
        x_ND, _ = encoder.encode(table["image"].to_pylist())
    flat = pa.array(x_ND.astype(np.float16).reshape(-1))
    vectors = pa.FixedSizeListArray.from_arrays(flat, x_ND.shape[1])
    pq.write_table(
        pa.table({"item_id": table["item_id"], "embedding": vectors}),
        to / part.name,
        compression="none",
        use_dictionary=False,
    )


def worker(
    kind: str, size: Size, device: str, folder: Path, rank: int, world: int, ready: object, go: object
) -> None:
    """One process of `--workers N`: every N-th shard."""
    torch.set_num_threads(4)
    compiled = device == "cuda"
    if kind == "text":
        encoder: TextEncoder | ImageEncoder = build_text(
            size, device, precision="bf16", compiled=compiled, budget=8_192
        )
    else:
        encoder = build_vision(size, device, precision="bf16", compiled=compiled)
    parts = sorted((folder / kind).glob("*.parquet"))
    embed_part(encoder, parts[rank % len(parts)], folder / f"{kind}-out")  # compiles
    synchronize()
    ready.release()
    go.wait()
    for part in parts[rank::world]:
        embed_part(encoder, part, folder / f"{kind}-out")
    synchronize()


def end_to_end(kind: str, size: Size, device: str, folder: Path, world: int) -> float:
    """Rows/s from the moment when all processes hold a warm model to the last written file."""
    context = mp.get_context("spawn")
    ready, go = context.Semaphore(0), context.Event()
    processes = [
        context.Process(target=worker, args=(kind, size, device, folder, rank, world, ready, go))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for _ in processes:
        while not ready.acquire(timeout=5):
            assert all(p.is_alive() for p in processes), "a worker died"
    start = time.perf_counter()
    go.set()
    for process in processes:
        process.join()
    spent = time.perf_counter() - start
    assert all(process.exitcode == 0 for process in processes)
    return (size.titles if kind == "text" else size.jpegs) / spent


def time_end_to_end(kind: str, size: Size, device: str, memory: float) -> list[dict[str, object]]:
    """Each number of workers, and its share of the best rate on data in memory."""
    rows = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        (folder / kind).mkdir()
        (folder / f"{kind}-out").mkdir()
        (write_titles if kind == "text" else write_jpegs)(size, folder / kind)
        for world in (1, 2, 4) if kind == "text" else (1, 4):
            rate = end_to_end(kind, size, device, folder, world)
            unit = "titles" if kind == "text" else "JPEGs of 256 x 256"
            rows.append(
                {
                    "what": f"{unit}, Parquet to Parquet, --workers {world}",
                    "rate": rate,
                    "share": rate / memory,
                }
            )
            say(rows[-1])
    return rows


def say(row: dict[str, object]) -> None:
    print(
        " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True
    )


def report(rows: list[dict[str, object]], ceiling: float, checks: list[str], device: str) -> str:
    """The Markdown page."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    lines = [
        "# Encoders on one GPU",
        "",
        f"`python3 benchmarks/gpu_encode.py` on {name}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {time.strftime('%Y-%m-%d')}, seed 0.",
        "",
        f"bf16 GEMM ceiling of the same run (8192^3, random data): {ceiling:.0f} TFLOP/s.",
        "",
        *(f"- {check}" for check in checks),
        "",
        "| what | rows/s | TFLOP/s | of the ceiling | of the rate in memory |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        tflops, share = row.get("tflops"), row.get("share")
        speed = ["", ""] if tflops is None else [f"{tflops:.0f}", f"{tflops / ceiling:.0%}"]
        part = "" if share is None else f"{share:.2f}"
        lines.append(f"| {row['what']} | {row['rate']:,.0f} | {speed[0]} | {speed[1]} | {part} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("encode_gpu.md"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models: does the script run?")
    parser.add_argument("--only", choices=("text", "vision"))
    parser.add_argument("--skip-end-to-end", action="store_true")
    args = parser.parse_args()
    size = SMALL if args.small else Size()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    checks = [check_text(size, args.device, 4096), check_vision(size, args.device)]
    print("\n".join(checks), flush=True)
    ceiling = gemm_ceiling(args.device, size)
    print(f"ceiling {ceiling:.0f} TFLOP/s", flush=True)
    rows: list[dict[str, object]] = []
    for kind, in_memory in (("text", time_text), ("vision", time_vision)):
        if args.only not in (None, kind):
            continue
        found = in_memory(size, args.device)
        rows += found
        args.out.write_text(report(rows, ceiling, checks, args.device))
        if not args.skip_end_to_end:
            rows += time_end_to_end(kind, size, args.device, max(float(row["rate"]) for row in found))
            args.out.write_text(report(rows, ceiling, checks, args.device))
    print(report(rows, ceiling, checks, args.device))


if __name__ == "__main__":
    main()
