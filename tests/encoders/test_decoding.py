"""Decoding in threads and in processes: the same slots, the same reasons, and nobody left behind."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prerank_tools.encoders.decoding import Decoder, Into, shared_bytes
from prerank_tools.encoders.pictures import Cut, Limits, read_below
from prerank_tools.errors import RetryError

CUT = Cut((8, 8), Image.Resampling.BICUBIC)


def photo(seed: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def decoder(workers: int, *, processes: bool, longest: int = 0) -> Decoder:
    size = 24 * 192
    buffer = shared_bytes(size) if processes else bytearray(size)
    into = Into(buffer, 192, (8, 8, 3), "|u1", CUT, Limits(max_pixels=1_000), longest)
    return Decoder(into, workers, processes)


def test_processes_fill_the_slots_that_threads_fill(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photo(9, "JPEG"))
    bomb = io.BytesIO()
    Image.new("RGB", (40, 40)).save(bomb, "PNG")
    sources = [
        *(photo(seed) for seed in range(17)),
        b"junk",
        bomb.getvalue(),
        partial(read_below, tmp_path, "a.jpg", 10_000),
        partial(read_below, tmp_path, "none.jpg", 10_000),
    ]
    found = []
    for workers, processes in ((1, False), (3, False), (2, True)):
        filled = decoder(workers, processes=processes)
        reasons = filled.wait(filled.start(2, sources))
        found.append((reasons, filled.into.slots().tobytes()))
    assert found[0] == found[1] == found[2]
    reasons, slots = found[0]
    assert [n for n, reason in enumerate(reasons) if reason] == [17, 18, 20]
    assert (
        "not a picture" in reasons[17] and "more than 1000 pixels" in reasons[18] and "no such" in reasons[20]
    )
    expected = np.asarray(Image.open(io.BytesIO(photo(3))).resize((8, 8), Image.Resampling.BICUBIC))
    assert np.frombuffer(slots, np.uint8).reshape(24, 192)[5].tobytes() == expected.tobytes()


def test_what_a_gpu_can_cut_is_left_uncut() -> None:
    filled = decoder(1, processes=False, longest=8)
    small, long = (Image.fromarray(np.full(shape, 7, np.uint8)) for shape in ((5, 8, 3), (3, 9, 3)))
    sources = []
    for picture in (small, long):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        sources.append(buffer.getvalue())
    assert filled.wait(filled.start(0, sources)) == [(8, 5), None]
    slots = filled.into.slots()
    assert slots[0].tolist() == [7] * 120 + [0] * 72 and slots[1].tolist() == [7] * 192


def end_this_process() -> bytes:
    os.kill(os.getpid(), signal.SIGKILL)
    return b""


def test_a_process_that_dies_is_a_reason_to_run_again() -> None:
    filled = decoder(1, processes=True)
    with pytest.raises(RetryError, match="died"):
        filled.wait(filled.start(0, [end_this_process]))
    assert filled.wait(filled.start(0, [photo(0)])) == [None]  # with new processes


held: list[Decoder] = []  # as a worker holds its encoder until the very end


def decode_in_a_worker() -> None:
    filled = decoder(2, processes=True)
    held.append(filled)
    assert filled.wait(filled.start(0, [photo(n) for n in range(20)])) == [None] * 20


def test_a_worker_of_an_engine_ends_with_its_decoder_open() -> None:
    """It waits for its children before it ends: they must have been told to."""
    worker = multiprocessing.get_context("spawn").Process(target=decode_in_a_worker)
    worker.start()
    worker.join(timeout=60)
    code = worker.exitcode
    worker.kill()
    assert code == 0


ORPHANS = """
import multiprocessing, os, signal
from tests.encoders.test_decoding import decoder, photo
if __name__ == "__main__":
    filled = decoder(2, processes=True)
    filled.wait(filled.start(0, [photo(n) for n in range(20)]))
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_process_outlives_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(ORPHANS)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, script], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL and len(pids) == 2, done.stderr.decode()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
