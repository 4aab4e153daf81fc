"""One holder at a time, in whatever way its turn ends."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prerank_tools.encoders import turns
from prerank_tools.encoders.turns import Turn, turn_on


def warm(path: Path, finish: Callable[[], object] = lambda: None) -> Turn:
    """A turn after its first time."""
    turn = Turn(path)
    with turn:
        pass
    turn._finish = finish
    return turn


def test_the_first_time_nobody_waits(tmp_path: Path) -> None:
    with warm(tmp_path / "lock"), Turn(tmp_path / "lock"):
        pass


def test_a_second_waits_until_the_first_has_finished(tmp_path: Path) -> None:
    said: list[str] = []
    first = warm(tmp_path / "lock", lambda: said.append("first finished"))
    second, waiting = warm(tmp_path / "lock"), threading.Event()

    def follow() -> None:
        waiting.set()
        with second:
            said.append("second")

    thread = threading.Thread(target=follow)
    with first:
        thread.start()
        waiting.wait()
        thread.join(0.2)
        assert thread.is_alive() and said == []
    thread.join(5)
    assert said == ["first finished", "second"]


def test_a_fault_within_and_one_while_finishing_hand_the_turn_on(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("the card is gone")

    with pytest.raises(KeyError), warm(tmp_path / "lock"):
        raise KeyError
    with pytest.raises(RuntimeError, match="gone"), warm(tmp_path / "lock", fail):
        pass
    with warm(tmp_path / "lock"):
        pass


def test_a_process_that_dies_gives_its_turn_back(tmp_path: Path) -> None:
    dying = (
        "import os, sys, pathlib; from prerank_tools.encoders.turns import Turn\n"
        "turn = Turn(pathlib.Path(sys.argv[1]))\nwith turn: pass\nturn.__enter__(); os._exit(1)"
    )
    assert subprocess.run([sys.executable, "-c", dying, tmp_path / "lock"], check=False).returncode == 1
    with warm(tmp_path / "lock"):
        pass


def test_a_holder_that_hangs_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.2)
    hanging, patient, third = (Turn(tmp_path / "lock") for _ in range(3))
    for turn in (hanging, patient, third):
        with turn:  # the first time nobody waits
            pass
    with hanging:
        with patient:
            pass
        with patient:  # on its own from then on
            pass
    monkeypatch.setattr(turns, "PATIENCE", 5.0)
    time.sleep(0.1)  # the thread that waited for `patient` gets the lock, which nobody holds any more
    began = time.monotonic()
    with third:
        pass
    assert time.monotonic() - began < 2


def test_on_a_cpu_nobody_waits() -> None:
    with turn_on(torch.device("cpu")), turn_on(torch.device("cpu")):
        pass
