"""Threads share the heaps of the C library where that is glibc."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from prerank_tools.run.heaps import share_heaps

SCRIPT = """
import ctypes, os, re, sys, threading
from prerank_tools.run.heaps import share_heaps
if sys.argv[1] == "shared":
    share_heaps()
together = threading.Barrier(6)
def use():
    together.wait()
    held = [bytearray(100_000) for _ in range(50)]
    together.wait()
threads = [threading.Thread(target=use) for _ in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
stream = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, stream)
libc.fclose(stream)
print(len(re.findall("<heap ", open(sys.argv[2]).read())), os.environ.get("MALLOC_ARENA_MAX"))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="heaps of glibc")
@pytest.mark.parametrize(("way", "told"), [("shared", "2"), ("own", "None")])
def test_threads_share_two_heaps(
    way: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    line = [sys.executable, "-c", SCRIPT, way, str(tmp_path / "info.xml")]
    heaps, limit = subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()
    assert limit == told
    assert int(heaps) <= 2 if way == "shared" else int(heaps) > 2


def test_a_limit_of_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "7")
    share_heaps()
    assert os.environ["MALLOC_ARENA_MAX"] == "7"
