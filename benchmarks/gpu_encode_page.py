"""The Markdown page of `gpu_encode.py`'s figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def report(parts: Sequence[dict[str, Any]]) -> str:
    """The Markdown page."""
    lines = ["# Encoders on one GPU", ""]
    for part in parts:
        at = part["where"]
        lines += [
            f"## {part['name']}",
            "",
            f"`python3 benchmarks/gpu_encode.py {part['name']}` on {at['card']}; {at['cpu']}; "
            f"{at['versions']}; {at['date']}, seed 0.",
            "",
        ]
        lines += [*(f"- {note}" for note in part["notes"]), *([""] if part["notes"] else [])]
        lines += codes_table(part) if "codes" in part else rates_table(part)
    return "\n".join(lines) + "\n"


def rates_table(part: dict[str, Any]) -> list[str]:
    ceiling = part["ceiling"]
    lines = [
        f"bf16 GEMM ceiling of the same run (8192^3, random data): {ceiling:.0f} TFLOP/s.",
        "",
        "| what | rows/s | TFLOP/s | of the ceiling | of the forward pass | of one process | whole job, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in part["rows"]:
        tflops = row.get("tflops")
        speed = " | " if tflops is None else f"{tflops:.0f} | {tflops / ceiling:.1%}"
        shares = " | ".join(f"{row[name]:.2f}" if name in row else "" for name in ("share", "alone"))
        whole = f"{row['whole']:.0f}" if "whole" in row else ""
        lines.append(f"| {row['what']} | {row['rate']:,.0f} | {speed} | {shares} | {whole} |")
    return [*lines, ""]


def codes_table(part: dict[str, Any]) -> list[str]:
    lines = [
        f"{part['titles']:,} real titles; residual k-means codebooks of 3 x 256 fitted on fp32 vectors of",
        "the CPU, against which all is held.",
        "",
        "| vectors | equal full SIDs | equal level-1 codes | cosine mean | cosine min | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in part["codes"]:
        cosine = f"{row['mean']:.7f} | {row['min']:.7f} | {row['largest']:.1e}"
        lines.append(f"| {row['what']} | {row['full']:.2%} | {row['first']:.2%} | {cosine} |")
    return [*lines, ""]
