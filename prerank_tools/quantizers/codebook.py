"""The codebook artefact: what a fitted quantizer is on disk, its fingerprint, and the tokens of its codes.

Every quantizer is one class with `fit`, `encode` and `decode` (arrays in, arrays out) that can be turned into
a `Codebook` and back. A codebook folder is `config.json` and `model.safetensors`; nothing is ever unpickled.
"""
# N items, D dims, L levels, K codes of a level

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from prerank_tools.errors import ContractError

FORMAT_VERSION = 1
MAX_CODES = 65_536  # codes are uint16
MAX_LEVELS = 26  # tokens name levels a .. z

# kind -> "module:Class"; imported only when a folder of that kind is loaded.
KINDS: dict[str, str] = {
    "rkmeans": "prerank_tools.quantizers.rkmeans:RKMeans",
    "balanced-rkmeans": "prerank_tools.quantizers.balanced:BalancedRKMeans",
    "pq": "prerank_tools.quantizers.pq:ProductQuantizer",
    "random-hash": "prerank_tools.quantizers.random_hash:RandomHash",
    "rqvae": "prerank_tools.quantizers.rqvae:RQVAE",
    "rkmeans-plus": "prerank_tools.quantizers.rkmeans_plus:RKMeansPlus",
    "rkmeans-fsq": "prerank_tools.quantizers.fsq:RKMeansFSQ",
}


@runtime_checkable
class Quantizer(Protocol):
    """What every quantizer offers: `fit` returns itself, `encode` (N, L) uint16, `decode` (N, D) float32."""

    kind: ClassVar[str]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes per level."""

    @property
    def width(self) -> int:
        """D, the width of the vectors it was fitted on."""

    def fit(self, x_ND: np.ndarray, *, seed: int = 0, threads: int = 2, device: str = "cpu") -> Quantizer: ...

    def encode(self, x_ND: np.ndarray, *, threads: int = 2, device: str = "cpu") -> np.ndarray: ...

    def decode(self, codes_NL: np.ndarray) -> np.ndarray: ...

    def to_codebook(self) -> Codebook: ...

    @classmethod
    def from_codebook(cls, codebook: Codebook) -> Quantizer: ...


@dataclass(frozen=True)
class Codebook:
    """A fitted quantizer as plain data.

    `meta` holds what changes codes besides the arrays (preprocessing, normalisation; JSON values) and is part
    of the fingerprint, as is `lineage` (`{"encoder": fingerprint}`). `weights` are further arrays (a
    rotation, an MLP), also fingerprinted. `notes` (seed, iterations, rows fitted) and `stats` (arrays that
    describe the fit set, for the drift guard) are not.
    """

    kind: str
    codebooks: tuple[np.ndarray, ...]  # L arrays (K_l, d_l) float32; d_l = D unless the kind says otherwise
    width: int
    meta: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    lineage: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    stats: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= len(self.codebooks) <= MAX_LEVELS:
            raise ContractError(f"a codebook has 1 to {MAX_LEVELS} levels, not {len(self.codebooks)}")
        for level, codebook_KD in enumerate(self.codebooks):
            if codebook_KD.ndim != 2 or not 1 <= len(codebook_KD) <= MAX_CODES:
                raise ContractError(f"level {level} has shape {codebook_KD.shape}, wants (1..{MAX_CODES}, D)")
            if not np.isfinite(codebook_KD).all():
                raise ContractError(f"level {level} of the codebook holds NaN or infinity")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes per level."""
        return tuple(len(codebook_KD) for codebook_KD in self.codebooks)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over kind, encoder lineage, preprocessing and every byte of the arrays."""
        digest = hashlib.sha256(_json(self._identity()).encode())
        for name, array in sorted(self._arrays().items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`; equal codebooks give equal bytes."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        arrays = self._arrays() | {f"stats.{name}": array for name, array in self.stats.items()}
        save_file(
            {k: np.ascontiguousarray(v) for k, v in sorted(arrays.items())}, folder / "model.safetensors"
        )
        config = {"format": "prerank.codebook", "version": FORMAT_VERSION, **self._identity()}
        config |= {"levels": len(self.codebooks), "sizes": list(self.sizes), "notes": dict(self.notes)}
        config |= {"fingerprint": self.fingerprint}
        (folder / "config.json").write_text(_json(config, indent=2) + "\n")

    def with_lineage(self, lineage: Mapping[str, str]) -> Codebook:
        """The same codebook tied to the encoder that made its vectors."""
        return replace(self, lineage=dict(lineage))

    def _identity(self) -> dict[str, Any]:
        lineage = {"encoder": self.lineage["encoder"]} if "encoder" in self.lineage else {}
        return {"kind": self.kind, "width": self.width, "meta": dict(self.meta), "lineage": lineage}

    def _arrays(self) -> dict[str, np.ndarray]:
        levels = {f"codebook.{level:02d}": codebook_KD for level, codebook_KD in enumerate(self.codebooks)}
        return levels | {f"weights.{name}": array for name, array in self.weights.items()}


def load_codebook(folder: Path) -> Codebook:
    """Read a codebook folder; ContractError names the file when it is not one, or was altered."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        config = json.loads((folder / "config.json").read_text())
        arrays = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ContractError(
            f"{folder} is not a codebook: {error}",
            "name a folder written by `prerank quantize sid` (its codebook/) or `prerank train quantizer`",
        ) from error
    if not isinstance(config, dict) or config.get("format") != "prerank.codebook":
        raise ContractError(
            f"{folder}/config.json does not describe a codebook", "name the codebook folder itself"
        )
    codebook = Codebook(
        kind=config["kind"],
        codebooks=tuple(arrays[name] for name in sorted(arrays) if name.startswith("codebook.")),
        width=config["width"],
        meta=config["meta"],
        weights={k.removeprefix("weights."): v for k, v in arrays.items() if k.startswith("weights.")},
        lineage=config["lineage"],
        notes=config["notes"],
        stats={k.removeprefix("stats."): v for k, v in arrays.items() if k.startswith("stats.")},
    )
    if codebook.fingerprint != config["fingerprint"]:
        raise ContractError(
            f"{folder}: the arrays do not match the fingerprint {config['fingerprint']} in config.json",
            "the folder was altered or copied in part; restore it, published SIDs depend on its bytes",
        )
    return codebook


def load_quantizer(folder: Path) -> Quantizer:
    """The quantizer that a codebook folder holds, ready to `encode`."""
    return quantizer_of(load_codebook(folder))


def quantizer_of(codebook: Codebook) -> Quantizer:
    """The quantizer of a codebook, by its kind."""
    return quantizer_class(codebook.kind).from_codebook(codebook)


def quantizer_class(kind: str) -> type[Quantizer]:
    """The class of a kind; imports its module and nothing else."""
    if kind not in KINDS:
        raise ContractError(f"unknown quantizer kind {kind!r}", f"known kinds: {', '.join(KINDS)}")
    module, name = KINDS[kind].split(":")
    loaded: type[Quantizer] = getattr(import_module(module), name)
    return loaded


def token(level: int, code: int) -> str:
    """The token of one code: level 0 code 12 is `<a_12>`."""
    return f"<{chr(ord('a') + level)}_{code}>"


def sid_text(codes_L: Sequence[int]) -> str:
    """The SID of one item as text, `<a_12><b_3><c_250>`."""
    return "".join(token(level, int(code)) for level, code in enumerate(codes_L))


def sid_codes(sid: str) -> tuple[int, ...]:
    """The codes of an SID text; ValueError where it is not one, levels must be a, b, c in order."""
    codes = tuple(int(code) for code in re.findall(r"_(\d+)>", sid))
    if not codes or sid_text(codes) != sid:
        raise ValueError(f"not an SID: {sid!r}")
    return codes


def _json(value: Any, *, indent: int | None = None) -> str:
    return json.dumps(value, sort_keys=True, indent=indent, ensure_ascii=False)
