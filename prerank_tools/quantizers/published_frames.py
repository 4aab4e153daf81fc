"""What last night published of tonight's items, found by id in bounded memory."""
# N items of tonight, P of one part of last night, L levels

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from prerank_tools.errors import ContractError
from prerank_tools.quantizers.codebook import Codebook
from prerank_tools.quantizers.collisions import EMPTY, Ledger
from prerank_tools.quantizers.mapped_frames import Mapped
from prerank_tools.quantizers.sid_keys import pack_codes
from prerank_tools.tables.table import Table, read_shard, shards_of
from prerank_tools.tables.vectors import vectors_to_numpy

SEEDS = (20251222, 20251223)  # two 64-bit hashes of a string: no two ids of a catalogue agree in both


@dataclass(frozen=True)
class Published:
    """What stood before, aligned with tonight's rows; rows that are not known hold zeros.

    Under the same codebook `key_N` holds the published codes and `suffix_N` the suffixes where there were
    any; under another one `codes_NL` holds its codes.
    """

    known_N: np.ndarray
    key_N: np.ndarray | None = None
    suffix_N: np.ndarray | None = None
    codes_NL: np.ndarray | None = None
    ledger: Ledger = EMPTY


def published(mapped: Mapped, table: Table | None, codebook: Codebook) -> Published:
    """Look tonight's rows up in last night's table, one part of it at a time.

    Raises ContractError where that table names this codebook but has SIDs of another length.
    """
    known_N = np.zeros(mapped.rows, dtype=bool)
    if table is None:
        return Published(known_N)
    same = table.lineage.get("codebook") == codebook.fingerprint
    levels = _levels(table)
    if same and levels != len(codebook.sizes):
        raise ContractError(
            f"{table.path}: SIDs of {levels} levels, the codebook has {len(codebook.sizes)}",
            "name its own SIDs",
        )
    numbered = same and "suffix" in table.schema
    key_N = np.zeros(mapped.rows, dtype=np.int64) if same else None
    codes_NL = None if same else np.zeros((mapped.rows, levels), dtype=np.uint16)
    suffix_N = np.zeros(mapped.rows, dtype=np.uint32) if numbered else None
    finder = Finder(mapped)
    for shard in shards_of(table):
        frame = read_shard(shard, ["item_id", "codes", *(["suffix"] if numbered else [])]).drop_nulls(
            "item_id"
        )
        at_P, row_P = finder.find(frame["item_id"])
        known_N[row_P] = True
        codes_PL = vectors_to_numpy(frame["codes"])[at_P]
        if key_N is not None:
            key_N[row_P] = pack_codes(codes_PL, codebook.sizes)
        if codes_NL is not None:
            codes_NL[row_P] = codes_PL
        if suffix_N is not None:
            suffix_N[row_P] = frame["suffix"].fill_null(0).to_numpy()[at_P]
    ledger = stored_ledger(table, codebook) if numbered else EMPTY
    return Published(known_N, key_N, suffix_N, codes_NL, ledger)


def stored_ledger(table: Table, codebook: Codebook) -> Ledger:
    """The ledger beside a table; without one, what its rows tell (suffixes freed before are then unknown)."""
    from safetensors.numpy import load_file

    path = table.path / "suffixes" / "ledger.safetensors"
    if path.is_file():
        stored = load_file(path)
        return Ledger(stored["key"], stored["next"])
    frame = table.read(["codes", "suffix"])
    keys_P = pack_codes(vectors_to_numpy(frame["codes"]), codebook.sizes)
    return Ledger.of(keys_P, frame["suffix"].fill_null(0).to_numpy())


class Finder:
    """Rows of tonight by item id: whole numbers themselves, strings by two hashes; 16 to 24 bytes a row."""

    def __init__(self, mapped: Mapped) -> None:
        first_N = np.empty(mapped.rows, dtype=np.uint64)
        second_N: np.ndarray | None = None
        for at, frame in mapped.read("item_id"):
            first_N[at] = _word(frame["item_id"], SEEDS[0])
            if not frame["item_id"].dtype.is_integer():
                second_N = np.empty(mapped.rows, dtype=np.uint64) if second_N is None else second_N
                second_N[at] = _word(frame["item_id"], SEEDS[1])
        self.order_N = np.argsort(first_N, kind="stable")
        self.first_N = first_N[self.order_N]
        self.second_N = second_N

    def find(self, ids: pl.Series) -> tuple[np.ndarray, np.ndarray]:
        """(places among `ids` of those that are there tonight, their rows)."""
        if not len(self.first_N):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        word_P = _word(ids, SEEDS[0])
        at_P = np.minimum(np.searchsorted(self.first_N, word_P), len(self.first_N) - 1)
        row_P = self.order_N[at_P]
        found_P = self.first_N[at_P] == word_P
        if self.second_N is not None:
            found_P &= self.second_N[row_P] == _word(ids, SEEDS[1])
        return np.flatnonzero(found_P), row_P[found_P]


def _word(ids: pl.Series, seed: int) -> np.ndarray:
    return ids.to_numpy().view(np.uint64) if ids.dtype.is_integer() else ids.hash(seed).to_numpy()


def _levels(table: Table) -> int:
    dtype = table.scan(["codes"]).collect_schema()["codes"]
    assert isinstance(dtype, pl.Array)
    return dtype.size


def ledger_to(folder: Path, ledger: Ledger) -> None:
    """Store the next free suffix of every SID, so that a freed one is never given again."""
    from safetensors.numpy import save_file

    if len(ledger.key_M):
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"key": ledger.key_M, "next": ledger.next_M}
        save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()},
            folder / "ledger.safetensors",
        )
