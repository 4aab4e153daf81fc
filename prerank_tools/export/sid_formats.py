"""SIDs in other projects' formats, and back: LC-Rec, GRID, TorchEasyRec, OpenOneRec, LLM tokens, lookup.

Every writer takes the SID table in parts, so that no format needs the whole catalogue as Python objects.
A suffix, where the table has one, is one code level more in every format.
"""

# N items, L levels
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl

from prerank_tools.errors import ContractError, UsageError
from prerank_tools.quantizers.codebook import sid_codes, sid_text, token
from prerank_tools.tables.parquet import write_parquet
from prerank_tools.tables.vectors import numpy_to_vectors, vectors_to_numpy

SidFormat = Literal["lcrec", "grid", "tzrec", "openonerec", "tokens", "lookup"]
Parts = Iterable[tuple[pl.Series, np.ndarray]]  # (item ids, codes_NL) part by part
README = {
    "lcrec": "index.json: item id -> list of tokens (LC-Rec, LETTER, MiniOneRec; codes from 0).",
    "grid": "sids.safetensors: tensor `sids` int64 [L, N]; id_map.parquet: column of `sids` -> item_id. "
    "For loaders that want a .pt file: torch.save(load_file('sids.safetensors')['sids'], 'sids.pt').",
    "tzrec": "map.parquet: item_id, origin_codebook, codebook, index (slot in the SID, from 1); "
    "groups.parquet: codebook, itemids (TorchEasyRec, resolve_sid_collisions).",
    "openonerec": "codes.parquet: pid, codes (list of int64).",
    "tokens": "items.jsonl: item_id and its token string; added_tokens.json: words to add to a vocabulary.",
    "lookup": "lookup.parquet: sid, codes, item_ids, sorted by codes.",
}


def write_sids(format: SidFormat, parts: Parts, folder: Path, *, sizes: tuple[int, ...]) -> Mapping[str, Any]:
    """Write one format into `folder`, with a README of its files; returns items, levels and codes a level."""
    if format not in get_args(SidFormat):
        raise UsageError(f"unknown SID format {format!r}", "one of " + ", ".join(get_args(SidFormat)))
    folder.mkdir(parents=True, exist_ok=True)
    counted = _Counted(parts)
    _WRITERS[format](counted, folder, sizes)
    (folder / "README.txt").write_text(README[format] + "\n")
    return {"format": format, "items": counted.items, "levels": len(sizes), "sizes": list(sizes)}


def is_export(path: Path) -> bool:
    """Whether a path is a file of one of the formats, or a folder that holds one."""
    return path.name in _READERS if path.is_file() else any((path / name).is_file() for name in _READERS)


def read_sids(path: Path) -> tuple[pl.Series, np.ndarray]:
    """Item ids and codes (N, L) of a folder or file in any of the formats; ContractError where it is none."""
    for name, read in _READERS.items():
        file = path / name if path.is_dir() else path
        if file.is_file() and file.name == name:
            try:
                return read(file)
            except (ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as fault:
                raise ContractError(f"{file}: not SIDs ({fault})", "see README.txt of an export") from fault
    raise ContractError(
        f"{path}: no known SID file", "expected one of " + ", ".join(_READERS) + ", or a table of item_sids"
    )


class _Counted:
    """The parts as they pass, and how many items they held."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.items = parts, 0

    def __iter__(self) -> Iterator[tuple[pl.Series, np.ndarray]]:
        for ids, codes_NL in self.parts:
            self.items += len(ids)
            yield ids, codes_NL


def _write_lcrec(parts: Parts, folder: Path, sizes: tuple[int, ...]) -> None:
    with (folder / "index.json").open("w", encoding="utf-8") as out:
        lead = "{"
        for ids, codes_NL in parts:
            for item, codes_L in zip(ids, codes_NL.tolist(), strict=True):
                tokens = [token(level, code) for level, code in enumerate(codes_L)]
                out.write(f"{lead}\n{json.dumps(str(item))}: {json.dumps(tokens)}")
                lead = ","
        out.write("\n}\n" if lead == "," else "{}\n")


def _write_grid(parts: Parts, folder: Path, sizes: tuple[int, ...]) -> None:
    from safetensors.numpy import save_file

    ids, codes_NL = _joined(parts)
    tensors = {"sids": np.ascontiguousarray(codes_NL.T.astype(np.int64))}
    save_file(tensors, folder / "sids.safetensors")
    columns = pl.Series("column", np.arange(len(ids)))
    write_parquet(pl.DataFrame([columns, ids.alias("item_id")]), folder / "id_map.parquet")


def _write_tzrec(parts: Parts, folder: Path, sizes: tuple[int, ...]) -> None:
    ids, codes_NL = _joined(parts)
    codes = numpy_to_vectors("codebook", codes_NL.astype(np.int64)).arr.to_list()
    frame = pl.DataFrame([ids.alias("item_id"), codes.alias("origin_codebook"), codes])
    place = pl.int_range(1, pl.len() + 1, dtype=pl.Int64).over("codebook").alias("index")
    frame = frame.sort("item_id").with_columns(place)
    write_parquet(frame, folder / "map.parquet")
    groups = frame.group_by("codebook").agg(pl.col("item_id").alias("itemids"))
    levels = [pl.col("codebook").list.get(level) for level in range(len(sizes))]
    write_parquet(groups.sort(*levels), folder / "groups.parquet")


def _write_openonerec(parts: Parts, folder: Path, sizes: tuple[int, ...]) -> None:
    ids, codes_NL = _joined(parts)
    codes = numpy_to_vectors("codes", codes_NL.astype(np.int64)).arr.to_list()
    write_parquet(pl.DataFrame([ids.alias("pid"), codes]), folder / "codes.parquet")


def _write_tokens(parts: Parts, folder: Path, sizes: tuple[int, ...]) -> None:
    with (folder / "items.jsonl").open("w", encoding="utf-8") as out:
        for ids, codes_NL in parts:
            for item, codes_L in zip(ids, codes_NL.tolist(), strict=True):
                out.write(json.dumps({"item_id": item, "sid": sid_text(codes_L)}, ensure_ascii=False) + "\n")
    added = [token(level, code) for level, size in enumerate(sizes) for code in range(size)]
    (folder / "added_tokens.json").write_text(json.dumps(added, indent=0) + "\n")


def _write_lookup(parts: Parts, folder: Path, sizes: tuple[int, ...]) -> None:
    ids, codes_NL = _joined(parts)
    names = [f"level_{level}" for level in range(len(sizes))]
    frame = pl.DataFrame(codes_NL, schema=names).with_columns(ids.alias("item_id"))
    grouped = frame.group_by(names).agg(pl.col("item_id").sort().alias("item_ids")).sort(names)
    codes_ML = grouped.select(names).to_numpy()
    words = [
        pl.lit(f"<{chr(ord('a') + level)}_") + pl.col(name).cast(pl.String) + ">"
        for level, name in enumerate(names)
    ]
    columns = [grouped.select(pl.concat_str(words).alias("sid")).to_series()]
    columns += [numpy_to_vectors("codes", codes_ML), grouped["item_ids"]]
    write_parquet(pl.DataFrame(columns), folder / "lookup.parquet")


def _read_lcrec(file: Path) -> tuple[pl.Series, np.ndarray]:
    index = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(index, dict):
        raise ValueError("expected an object of item id -> tokens")
    codes = [sid_codes("".join(tokens)) for tokens in index.values()]
    return _ids(list(index)), _matrix(codes)


def _read_grid(file: Path) -> tuple[pl.Series, np.ndarray]:
    from safetensors.numpy import load_file

    codes_NL = load_file(file)["sids"].T
    id_map = file.with_name("id_map.parquet")
    if not id_map.is_file():
        return pl.Series("item_id", np.arange(len(codes_NL))), codes_NL
    ids = pl.read_parquet(id_map).sort("column")["item_id"]
    if len(ids) != len(codes_NL):
        raise ValueError(f"{len(codes_NL)} columns, {len(ids)} ids in {id_map.name}")
    return ids, codes_NL


def _read_lists(ids: str, codes: str) -> Callable[[Path], tuple[pl.Series, np.ndarray]]:
    def read(file: Path) -> tuple[pl.Series, np.ndarray]:
        frame = pl.read_parquet(file, columns=[ids, codes])
        levels = frame[codes].list.len().unique()
        if len(levels) != 1:
            raise ValueError(f"`{codes}` has SIDs of {sorted(levels)} levels")
        fixed = frame[codes].cast(pl.List(pl.Int64)).list.to_array(int(levels[0]))
        return frame[ids].alias("item_id"), vectors_to_numpy(fixed)

    return read


def _read_tokens(file: Path) -> tuple[pl.Series, np.ndarray]:
    frame = pl.read_ndjson(file)
    return frame["item_id"], _matrix([sid_codes(sid) for sid in frame["sid"]])


def _read_lookup(file: Path) -> tuple[pl.Series, np.ndarray]:
    frame = pl.read_parquet(file)
    codes_ML = vectors_to_numpy(frame["codes"])
    ids = frame.select(pl.col("item_ids").explode().alias("item_id")).to_series()
    return ids, np.repeat(codes_ML, frame["item_ids"].list.len().to_numpy(), axis=0)


def _joined(parts: Parts) -> tuple[pl.Series, np.ndarray]:
    ids, codes = zip(*parts, strict=True)
    return pl.concat(ids), np.concatenate(codes)


def _ids(keys: list[str]) -> pl.Series:
    """JSON keys are text; whole numbers written as such were int64 ids."""
    numbers = all(key.isascii() and key.lstrip("-").isdigit() and str(int(key)) == key for key in keys)
    return pl.Series("item_id", [int(key) for key in keys] if numbers else keys)


def _matrix(codes: list[tuple[int, ...]]) -> np.ndarray:
    if len({len(codes_L) for codes_L in codes}) > 1:
        raise ValueError("SIDs of different lengths")
    return np.array(codes, dtype=np.int64)


_WRITERS: dict[str, Callable[[Parts, Path, tuple[int, ...]], None]] = {
    "lcrec": _write_lcrec,
    "grid": _write_grid,
    "tzrec": _write_tzrec,
    "openonerec": _write_openonerec,
    "tokens": _write_tokens,
    "lookup": _write_lookup,
}
_READERS: dict[str, Callable[[Path], tuple[pl.Series, np.ndarray]]] = {
    "index.json": _read_lcrec,
    "sids.safetensors": _read_grid,
    "map.parquet": _read_lists("item_id", "codebook"),
    "codes.parquet": _read_lists("pid", "codes"),
    "items.jsonl": _read_tokens,
    "lookup.parquet": _read_lookup,
}
