"""The codebook artefact: same bytes, same fingerprint; altered or foreign folders are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prerank_tools.errors import ContractError
from prerank_tools.quantizers.codebook import Codebook, load_codebook, sid_codes, sid_text, token


def small() -> Codebook:
    return Codebook(
        kind="rkmeans",
        codebooks=(np.eye(3, 2, dtype=np.float32), np.ones((2, 2), dtype=np.float32)),
        width=2,
        meta={"normalize": "none"},
        weights={"rotation": np.eye(2, dtype=np.float32)},
        lineage={"encoder": "abc"},
        notes={"seed": 7},
        stats={"counts.0": np.array([3, 2, 1])},
    )


def test_save_and_load_give_the_same_codebook(tmp_path: Path) -> None:
    small().save(tmp_path / "cb")
    loaded = load_codebook(tmp_path / "cb")
    assert loaded.sizes == (3, 2)
    assert loaded.fingerprint == small().fingerprint
    assert loaded.notes == {"seed": 7}
    np.testing.assert_array_equal(loaded.codebooks[0], small().codebooks[0])
    np.testing.assert_array_equal(loaded.stats["counts.0"], [3, 2, 1])
    assert sorted(p.name for p in (tmp_path / "cb").iterdir()) == ["config.json", "model.safetensors"]


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    small().save(tmp_path / "one")
    small().save(tmp_path / "two")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_fingerprint_covers_arrays_preprocessing_and_encoder_only() -> None:
    base = small()
    moved = replace(base, codebooks=(base.codebooks[0] + 1, base.codebooks[1]))
    changed = {
        base.fingerprint,
        moved.fingerprint,
        replace(base, meta={"normalize": "l2"}).fingerprint,
        replace(base, lineage={"encoder": "abd"}).fingerprint,
        replace(base, weights={"rotation": 2 * base.weights["rotation"]}).fingerprint,
        replace(base, kind="pq").fingerprint,
    }
    assert len(changed) == 6
    assert replace(base, notes={"seed": 8}, stats={}).fingerprint == base.fingerprint
    assert replace(base, lineage={"encoder": "abc", "items": "x"}).fingerprint == base.fingerprint


def test_altered_folder_is_refused(tmp_path: Path) -> None:
    small().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["meta"]["normalize"] = "l2"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ContractError, match="do not match the fingerprint"):
        load_codebook(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", "not json"])
def test_a_folder_that_is_no_codebook_is_refused(tmp_path: Path, text: str) -> None:
    small().save(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ContractError):
        load_codebook(tmp_path)


def test_missing_folder_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ContractError) as caught:
        load_codebook(tmp_path / "none")
    assert "quantize sid" in caught.value.hint


def test_nan_codebook_is_refused() -> None:
    with pytest.raises(ContractError, match="NaN"):
        Codebook(kind="rkmeans", codebooks=(np.full((2, 2), np.nan, dtype=np.float32),), width=2)


def test_tokens() -> None:
    assert token(1, 3) == "<b_3>"
    assert sid_text((12, 3, 250)) == "<a_12><b_3><c_250>"
    assert sid_codes("<a_12><b_3><c_250>") == (12, 3, 250)
    for bad in ("", "<b_1>", "<a_1><c_2>", "<a_01>", "<a_1>x"):
        with pytest.raises(ValueError, match="not an SID"):
            sid_codes(bad)
