"""Row formats against torch's casts, golden bytes and the rounding rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank_tools.precision import rows
from prerank_tools.precision.fidelity import cosines, neighbour_overlap


def test_int8_golden() -> None:
    packed = rows.encode(np.array([[1.27, -0.635, 0.0, 0.004]], np.float32), format="int8")
    assert packed.codes_NW.tolist() == [[127, -64, 0, 0]]  # 63.5 goes to the even 64
    assert packed.codes_NW.dtype == np.int8
    assert packed.scale_N[0] == np.float32(1.27) / np.float32(127)


def test_int8_ties_go_to_even() -> None:
    packed = rows.encode(np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32), format="int8")
    assert packed.codes_NW.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_e4m3_golden_codes() -> None:
    values = np.array(
        [0.0, -0.0, 1.0, -1.0, 448.0, 1e9, -1e9, 2.0**-6, 2.0**-9, 2.0**-10, 2.0**-11], np.float32
    )
    expected = [0x00, 0x80, 0x38, 0xB8, 0x7E, 0x7E, 0xFE, 0x08, 0x01, 0x00, 0x00]
    assert rows.float_to_e4m3(values).tolist() == expected


def test_e4m3_decodes_every_code_as_torch_does() -> None:
    codes = np.arange(256, dtype=np.uint8)
    theirs = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(rows.e4m3_to_float(codes), theirs)


def test_e4m3_round_trips_every_code() -> None:
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(rows.float_to_e4m3(rows.e4m3_to_float(codes)), codes)


def test_e4m3_rounds_as_torch_at_and_around_every_midpoint() -> None:
    values = rows.e4m3_to_float(np.arange(0x7F, dtype=np.uint8))
    middle = (values[1:] + values[:-1]) / 2
    x = np.concatenate([middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(500))])
    x = np.concatenate([x, -x]).astype(np.float32)
    theirs = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(rows.float_to_e4m3(x), theirs)


@given(st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=64))
def test_e4m3_rounds_as_torch(values: list[float]) -> None:
    x = np.array(values, np.float32)
    theirs = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(rows.float_to_e4m3(x), theirs)


def test_fp8_rows_reach_the_largest_code() -> None:
    packed = rows.encode(np.array([[3.5, -1.75, 0.0]], np.float32), format="fp8")
    assert packed.codes_NW.tolist() == [[0x7E, 0xF6, 0x00]]
    np.testing.assert_allclose(rows.decode(packed), [[3.5, -1.75, 0.0]])


def test_uint4_packs_the_low_half_first() -> None:
    packed = rows.encode(np.array([[0.0, 1.0, 15.0]], np.float32), format="uint4")
    assert packed.codes_NW.tolist() == [[0x10, 0x0F]]
    assert (packed.scale_N[0], packed.offset_N[0]) == (1.0, 0.0)
    assert rows.decode(packed).tolist() == [[0.0, 1.0, 15.0]]


@pytest.mark.parametrize("format", rows.FORMATS)
def test_zero_and_tiny_rows_decode_to_zeros(format: rows.RowFormat) -> None:
    x = np.array([[0.0, 0.0], [1e-42, -1e-42]], np.float32)
    decoded = rows.decode(rows.encode(x, format=format))
    np.testing.assert_allclose(decoded, 0, atol=1e-40)


def test_constant_row_of_uint4_is_its_offset() -> None:
    packed = rows.encode(np.full((1, 4), 0.5, np.float32), format="uint4")
    assert packed.codes_NW.tolist() == [[0, 0]]
    assert rows.decode(packed).tolist() == [[0.5] * 4]


@pytest.mark.parametrize("format", rows.FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_is_refused(format: rows.RowFormat, bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        rows.encode(np.array([[1.0, bad]], np.float32), format=format)


@pytest.mark.parametrize(
    ("format", "mean", "low"), [("int8", 0.9999, 0.999), ("fp8", 0.9995, 0.999), ("uint4", 0.99, 0.98)]
)
def test_cosine_on_gaussian_rows(format: rows.RowFormat, mean: float, low: float) -> None:
    x_ND = np.random.default_rng(0).standard_normal((2000, 256)).astype(np.float32)
    cosine_N = cosines(x_ND, rows.decode(rows.encode(x_ND, format=format)))
    assert cosine_N.mean() >= mean
    assert cosine_N.min() >= low


@given(st.integers(1, 9), st.sampled_from(rows.FORMATS), st.integers(0, 2**31))
def test_error_is_at_most_half_a_step(dim: int, format: rows.RowFormat, seed: int) -> None:
    x_ND = np.random.default_rng(seed).standard_normal((3, dim)).astype(np.float32)
    packed = rows.encode(x_ND, format=format)
    # e4m3's widest step is 32 (between 256 and 448); uint4's offset is rounded to fp16 first.
    step = {"int8": 1.0, "fp8": 32.0, "uint4": 1.1}[format]
    assert (np.abs(rows.decode(packed) - x_ND) <= 0.5001 * step * packed.scale_N[:, None] + 1e-6).all()


def test_neighbour_overlap_against_a_loop() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((2, 40, 8)).astype(np.float32)

    def top(table: np.ndarray, row: int) -> set[int]:
        unit = table / np.linalg.norm(table, axis=1, keepdims=True)
        order = [int(j) for j in np.argsort(-(unit @ unit[row])) if j != row]
        return set(order[:5])

    expected = np.mean([len(top(x, i) & top(y, i)) / 5 for i in range(40)])
    assert neighbour_overlap(x, y, k=5) == pytest.approx(expected)


def test_equal_tables_overlap_wholly_even_with_ties() -> None:
    x = np.repeat(np.eye(3, dtype=np.float32), 8, axis=0)
    assert neighbour_overlap(x, x * 2, k=4) == 1.0


def test_cosines_of_zero_rows() -> None:
    x = np.array([[0, 0], [1, 0]], np.float32)
    assert cosines(x, x).tolist() == [1.0, 1.0]
    assert cosines(x, np.zeros_like(x)).tolist() == [1.0, 0.0]
