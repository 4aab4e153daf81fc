"""Collision policies: small cases by hand, and what must hold for any catalogue."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank_tools.errors import ContractError, UsageError
from prerank_tools.quantizers import collisions
from prerank_tools.quantizers.collisions import EMPTY, Ledger
from prerank_tools.quantizers.sid_keys import pack_codes, unpack_codes

SIZES = (4, 4)
POLICIES = ["keep", "suffix", "capacity", "sinkhorn", "optimal"]


class Unpacked(NamedTuple):
    codes_NL: np.ndarray
    suffix_N: np.ndarray | None
    ledger: Ledger
    moved: int
    unresolved: int


def resolve(codes_NL: np.ndarray, ids_N: np.ndarray, *, sizes: tuple[int, ...], **how: Any) -> Unpacked:
    """As `collisions.resolve`, codes in and out as small tables are written down here."""
    found = collisions.resolve(pack_codes(codes_NL, sizes), ids_N, sizes=sizes, **how)
    codes_NL = unpack_codes(found.key_N, sizes)
    return Unpacked(codes_NL, found.suffix_N, found.ledger, found.moved, found.unresolved)


def on_a_line(x_N: np.ndarray, codes: int = 4):  # type: ignore[no-untyped-def]
    """Distances of one-dimensional items to last-level codes at 0, 1, 2, ..."""
    return lambda rows: ((x_N[rows, None] - np.arange(codes)) ** 2).astype(np.float32)


def test_keys_pack_and_unpack_uneven_levels() -> None:
    codes = np.array([[3, 0, 6], [0, 1, 0], [2, 1, 5]])
    key = pack_codes(codes, (4, 2, 7))
    assert key.tolist() == [3 * 14 + 6, 7, 2 * 14 + 7 + 5]
    np.testing.assert_array_equal(unpack_codes(key, (4, 2, 7)), codes)


def test_keys_refuse_overflow_and_foreign_codes() -> None:
    with pytest.raises(ContractError, match="63 bits"):
        pack_codes(np.zeros((1, 5), dtype=int), (8192,) * 5)
    with pytest.raises(ContractError, match="level 2"):
        pack_codes(np.array([[0, 4]]), SIZES)


def test_suffix_counts_in_item_id_order() -> None:
    codes = np.array([[1, 1], [1, 1], [2, 0], [1, 1]])
    resolved = resolve(codes, np.array([30, 10, 5, 20]), sizes=SIZES, policy="suffix", width=4)
    assert resolved.suffix_N is not None and resolved.suffix_N.tolist() == [2, 0, 0, 1]


def test_suffix_of_string_ids() -> None:
    resolved = resolve(np.zeros((3, 2), int), np.array(["c", "a", "b"]), sizes=SIZES, policy="suffix")
    assert resolved.suffix_N is not None and resolved.suffix_N.tolist() == [2, 0, 1]


def test_suffix_over_its_width_is_an_error_that_names_the_width_to_set() -> None:
    with pytest.raises(ContractError, match="suffix 4, the declared width is 4") as error:
        resolve(np.zeros((5, 2), int), np.arange(5), sizes=SIZES, policy="suffix", width=4)
    assert "to 8" in error.value.hint


def test_a_published_suffix_stays_and_a_freed_one_is_never_reused() -> None:
    day1 = resolve(np.zeros((3, 2), int), np.array([1, 2, 3]), sizes=SIZES, policy="suffix", width=8)
    # Item 3 (suffix 2) is delisted; items 0 and 9 are new, and id 0 sorts first.
    day2 = resolve(
        np.zeros((4, 2), int),
        np.array([0, 1, 2, 9]),
        sizes=SIZES,
        policy="suffix",
        width=8,
        published_N=np.array([False, True, True, False]),
        suffix_N=np.array([-1, 0, 1, -1]),
        ledger=day1.ledger,
    )
    assert day2.suffix_N is not None and day2.suffix_N.tolist() == [3, 0, 1, 4]
    assert day2.ledger.next_free(np.array([0, 5])).tolist() == [5, 0]


def test_ledger_merge_keeps_the_larger_mark() -> None:
    one, two = Ledger.of(np.array([7, 3, 7]), np.array([0, 4, 1])), Ledger.of(np.array([7]), np.array([5]))
    assert one.merge(two).next_free(np.array([3, 7])).tolist() == [5, 6]
    assert EMPTY.merge(two).next_free(np.array([7])).tolist() == [6]


def test_capacity_moves_the_later_ids_to_their_nearest_code_with_room() -> None:
    x = np.array([0.1, 0.2, 0.3, 0.4, 1.0])
    codes = np.array([[2, 0]] * 4 + [[2, 1]])
    resolved = resolve(
        codes, np.arange(5), sizes=SIZES, policy="capacity", capacity=2, distances=on_a_line(x)
    )
    assert resolved.codes_NL.tolist() == [[2, 0], [2, 0], [2, 1], [2, 2], [2, 1]]
    assert (resolved.moved, resolved.unresolved) == (2, 0)


def test_capacity_leaves_published_items_where_they_are() -> None:
    published = np.array([False, False, True])
    resolved = resolve(
        np.zeros((3, 2), int),
        np.array([1, 2, 3]),
        sizes=SIZES,
        policy="capacity",
        capacity=1,
        distances=on_a_line(np.zeros(3)),
        published_N=published,
    )
    assert resolved.codes_NL[:, 1].tolist() == [1, 2, 0]


def test_capacity_counts_what_found_no_room() -> None:
    resolved = resolve(
        np.zeros((6, 2), int),
        np.arange(6),
        sizes=SIZES,
        policy="capacity",
        capacity=1,
        distances=on_a_line(np.zeros(6)),
    )
    assert resolved.unresolved == 2


def test_optimal_gives_every_item_of_a_prefix_its_own_code_at_least_cost() -> None:
    x = np.array([0.0, 0.4, 0.9])  # argmin gives 0, 0, 1; the best one-to-one is 0, 1, 2 or 1, 0, 2 ...
    codes = np.array([[1, 0], [1, 0], [1, 1]])
    resolved = resolve(codes, np.arange(3), sizes=SIZES, policy="optimal", distances=on_a_line(x))
    assert resolved.codes_NL[:, 1].tolist() == [0, 1, 2]  # cost 0 + .36 + 1.21; no other is lower


def test_optimal_with_more_items_than_codes_fills_evenly() -> None:
    resolved = resolve(
        np.zeros((8, 2), int),
        np.arange(8),
        sizes=SIZES,
        policy="optimal",
        distances=on_a_line(np.zeros(8)),
    )
    assert np.bincount(resolved.codes_NL[:, 1]).tolist() == [2, 2, 2, 2]
    assert resolved.unresolved == 4


def test_sinkhorn_parts_the_golden_eight() -> None:
    x = np.random.default_rng(0).normal(size=(8, 2)) * 0.05
    grid = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    resolved = resolve(
        np.zeros((8, 2), int),
        np.arange(8),
        sizes=SIZES,
        policy="sinkhorn",
        distances=lambda rows: ((x[rows][:, None] - grid) ** 2).sum(-1),
    )
    assert np.bincount(resolved.codes_NL[:, 1], minlength=4).max() <= 3


def test_a_policy_that_moves_needs_distances_and_an_unknown_one_is_refused() -> None:
    with pytest.raises(UsageError, match="needs distances"):
        resolve(np.zeros((1, 2), int), np.arange(1), sizes=SIZES, policy="optimal")
    with pytest.raises(UsageError, match="unknown collision policy"):
        resolve(np.zeros((1, 2), int), np.arange(1), sizes=SIZES, policy="hope")  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 40), policy=st.sampled_from(POLICIES))
def test_any_order_of_the_items_gives_the_same_sids_and_prefixes_never_move(
    seed: int, rows: int, policy: str
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.random(rows) * 4
    codes = np.stack([rng.integers(0, 2, rows), np.clip(np.round(x), 0, 3).astype(int)], axis=1)
    ids = rng.permutation(1000)[:rows]
    shuffle = rng.permutation(rows)

    def run(order: np.ndarray):  # type: ignore[no-untyped-def]
        d = on_a_line(x[order])
        return resolve(
            codes[order], ids[order], sizes=SIZES, policy=policy, capacity=2, distances=d, width=64
        )

    plain, shuffled = run(np.arange(rows)), run(shuffle)
    np.testing.assert_array_equal(plain.codes_NL[shuffle], shuffled.codes_NL)
    np.testing.assert_array_equal(plain.codes_NL[:, 0], codes[:, 0])
    if policy == "suffix":
        np.testing.assert_array_equal(plain.suffix_N[shuffle], shuffled.suffix_N)
        full = np.column_stack([plain.codes_NL, plain.suffix_N])
        assert len(np.unique(full, axis=0)) == rows


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), policy=st.sampled_from(["capacity", "optimal", "keep"]))
def test_resolving_twice_changes_nothing(seed: int, policy: str) -> None:
    rng = np.random.default_rng(seed)
    x = rng.random(12) * 4
    codes = np.stack([rng.integers(0, 4, 12), np.clip(np.round(x), 0, 3).astype(int)], axis=1)
    options = {"sizes": SIZES, "policy": policy, "capacity": 1, "distances": on_a_line(x)}
    once = resolve(codes, np.arange(12), **options)  # type: ignore[arg-type]
    twice = resolve(once.codes_NL, np.arange(12), **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(twice.codes_NL, once.codes_NL)


def test_a_hundred_thousand_skewed_rows_take_under_a_second() -> None:
    rng = np.random.default_rng(0)
    codes = np.minimum(rng.zipf(1.3, size=(100_000, 3)) - 1, 255)
    start = time.perf_counter()
    resolved = resolve(codes, rng.permutation(100_000), sizes=(256,) * 3, policy="suffix", width=65_536)
    assert time.perf_counter() - start < 1
    full = pack_codes(np.column_stack([resolved.codes_NL, resolved.suffix_N]), (256, 256, 256, 65_536))
    assert len(np.unique(full)) == 100_000
