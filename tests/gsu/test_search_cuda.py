"""The GPU search gives the bits of the definition; what needs no GPU of it is tested without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prerank_tools.errors import UsageError
from prerank_tools.gsu import batch_cuda, search_cuda
from prerank_tools.gsu.search import Groups, topk, topk_numpy
from prerank_tools.gsu.search_cuda import Plan, topk_cuda
from prerank_tools.gsu.simtier import simtier
from tests.gsu import test_search as hard
from tests.gsu.test_search import assert_same, one_user, random_groups

gpu = pytest.mark.gpu
EVERY_CARD = Plan(hopper=False)


@gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("width", [8, 64, 128, 130, 300, 512])
def test_cuda_gives_the_definition(dtype: type, width: int) -> None:
    rng = np.random.default_rng(width)
    table = (rng.normal(size=(300, width)) * (40 if dtype is np.int8 else 1)).astype(dtype)
    table[:5] = 0
    groups = random_groups(rng, len(table), longest=5000)
    expected = topk_numpy(table, groups, k=20)
    assert_same(topk(table, groups, k=20, backend="cuda"), expected)
    assert_same(topk_cuda(table, groups, k=20, plan=EVERY_CARD), expected)


@gpu
@pytest.mark.parametrize(
    "case",
    [
        hard.test_near_ties_that_bf16_cannot_tell_apart,
        hard.test_more_near_ties_than_a_shortlist_holds,
        hard.test_ties_go_to_the_later_behaviour,
        hard.test_a_user_whose_past_is_unlike_every_candidate,
    ],
)
def test_hard_cases_on_a_gpu(case: Any) -> None:
    case("cuda")


@gpu
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-42])
def test_lengths_that_single_precision_cannot_square(scale: float) -> None:
    rng = np.random.default_rng(4)
    table = rng.normal(size=(330, 32))
    table[::3] *= scale
    table = table.astype(np.float32)
    assert_same(topk_cuda(table, one_user(320, 10), k=30), topk_numpy(table, one_user(320, 10), k=30))


@gpu
@pytest.mark.parametrize("k", [1, 50, 64, 65, 96])
def test_any_k_and_one_item_seen_again_and_again(k: int) -> None:
    rng = np.random.default_rng(k)
    table = rng.normal(size=(800, 32)).astype(np.float16)
    rows = rng.integers(0, 700, 4000)
    rows[::3] = 7  # more ties than a list holds, at the top for candidate 7
    groups = Groups(
        rows, np.array([0, 4000]), np.arange(5, 150), np.array([0, 145]), rng.integers(0, 4001, 145)
    )
    assert_same(topk_cuda(table, groups, k=k), topk_numpy(table, groups, k=k))


@gpu
def test_histograms_and_near_cosines_without_lists() -> None:
    import torch

    rng = np.random.default_rng(9)
    table = rng.normal(size=(900, 64)).astype(np.float16)
    groups = random_groups(rng, 900, longest=6000, most=300)
    expected = topk_numpy(table, groups, k=50)
    on_card = torch.from_numpy(batch_cuda.padded(table)).cuda()
    past, asked, _ = batch_cuda.upload(on_card, groups, range(len(groups.history_offsets) - 1))
    for plan in (Plan(), Plan(last_bit=False), EVERY_CARD):
        found = search_cuda.search(past, asked, k=50, plan=plan, lists=False, tiers=True)
        np.testing.assert_array_equal(found.tier_MN.cpu().numpy(), simtier(expected.sims_MK))
        np.testing.assert_array_equal(found.n_valid_M.cpu().numpy(), expected.n_valid_M)
    near = search_cuda.search(past, asked, k=50, plan=Plan(last_bit=False))
    np.testing.assert_array_equal(near.positions_MK.cpu().numpy(), expected.positions_MK)
    np.testing.assert_allclose(near.sims_MK.cpu().numpy(), expected.sims_MK, atol=1e-6)


@gpu
def test_batches_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(10)
    table = rng.normal(size=(400, 32)).astype(np.float32)
    groups = random_groups(rng, 400, users=9, longest=3000, most=40)
    whole = topk_cuda(table, groups)
    monkeypatch.setattr(batch_cuda, "HISTORY_BYTES", 1 << 20)
    monkeypatch.setattr(search_cuda, "SCRATCH_BYTES", 1)
    assert_same(topk_cuda(table, groups), whole)
    assert_same(whole, topk_numpy(table, groups))


@gpu
def test_the_stage_writes_the_same_rows(tmp_path: Path) -> None:
    from tests.gsu.test_stage import random_stage, rows_of

    stage = random_stage(tmp_path, emit="both")
    on_gpu = rows_of(stage, tmp_path / "gpu", device="cuda")
    assert on_gpu.equals(rows_of(stage, tmp_path / "cpu", device="cpu"))


@gpu
def test_scores_search_inline_on_the_gpu() -> None:
    np.testing.assert_array_equal(inline_features("cuda"), inline_features("cpu"))


def inline_features(device: str) -> np.ndarray:
    """What a scorer is given of the past of two users, searched as it is needed."""
    import polars as pl

    from prerank_tools.scorers.past_frames import read_past, simtier_features
    from prerank_tools.scorers.request_frames import flatten
    from tests.scorers import test_frames

    rng = np.random.default_rng(0)
    log = pl.DataFrame({"user_id": rng.integers(0, 2, 900), "item_id": rng.integers(1, 4, 900)})
    log = log.with_columns(pl.Series("timestamp", np.arange(900)))
    asked = {"request_id": [1, 2], "user_id": [0, 1], "timestamp": [500, 900], "candidates": [[1, 2], [3, 1]]}
    catalogue = test_frames.catalogue()
    past, flat = read_past(log, catalogue), flatten(pl.DataFrame(asked))
    return simtier_features(past, catalogue, flat, k=50, lag=0, threads=1, device=device)


def test_scores_ask_for_the_back_end_of_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from prerank_tools.scorers import past_frames

    backends = []

    def recorded(*given: Any, backend: Any, **more: Any) -> Any:
        backends.append(backend)
        return topk(*given, backend="numpy", **{name: more[name] for name in ("k", "threads")})

    monkeypatch.setattr(past_frames, "topk", recorded)
    np.testing.assert_array_equal(inline_features("cuda"), inline_features("cpu"))
    assert backends == ["cuda", "numba"]


def test_tiles_hold_candidates_of_one_group() -> None:
    group, first, last = batch_cuda.tiles(np.array([0, 130, 130, 131, 387]), 128)
    assert group.tolist() == [0, 0, 2, 3, 3]
    assert first.tolist() == [0, 128, 130, 131, 259]
    assert last.tolist() == [128, 130, 131, 259, 387]


def test_batches_are_whole_groups_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = one_user(100, 4)
    three = replace_offsets(groups, [0, 40, 60, 100], [0, 1, 2, 4])
    assert list(batch_cuda.batches(three, 64)) == [range(0, 3)]
    monkeypatch.setattr(batch_cuda, "HISTORY_BYTES", 64 * 4 * 60)
    assert list(batch_cuda.batches(three, 64)) == [range(0, 2), range(2, 3)]
    monkeypatch.setattr(batch_cuda, "LIST_BYTES", 1)
    assert list(batch_cuda.batches(three, 64)) == [range(0, 1), range(1, 2), range(2, 3)]
    assert list(batch_cuda.batches(replace_offsets(groups, [0], [0]), 64)) == []


def replace_offsets(groups: Groups, history: list[int], candidates: list[int]) -> Groups:
    return groups._replace(history_offsets=np.array(history), candidate_offsets=np.array(candidates))


@pytest.mark.parametrize(
    ("width", "padded"), [(3, 64), (64, 64), (65, 128), (129, 256), (300, 384), (512, 512)]
)
def test_rows_are_padded_and_a_zero_row_stands_for_no_vector(width: int, padded: int) -> None:
    table = batch_cuda.padded(np.ones((2, width), dtype=np.int8))
    assert table.shape == (3, padded) and table.dtype == np.int8
    assert table.sum(1).tolist() == [width, width, 0]


@pytest.mark.parametrize("width", [64, 128, 256, 384, 512])
def test_every_width_fits_in_shared_memory(width: int) -> None:
    _, constants, shared = batch_cuda.layout(width)
    # 1024 bytes are the kernel's own; a round of tiles goes through all stages.
    assert shared + 1024 <= 227 << 10
    assert constants["STAGED"] > 4


def test_what_a_gpu_search_does_not_take_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="K to 96"):
        topk(np.ones((9, 16), dtype=np.float32), one_user(8, 1), k=97, backend="cuda")
    with pytest.raises(UsageError, match="widths to 512"):
        topk(np.ones((9, 513), dtype=np.float32), one_user(8, 1), backend="cuda")


def test_kernels_are_in_the_package() -> None:
    folder = Path(search_cuda.__file__).parent
    named = {path.name for path in folder.glob("*.cu*")}
    assert named == {"cosine.cuh", "product.cuh", "rank.cu", "rows.cu", "settle.cu", "shortlist.cu"}
