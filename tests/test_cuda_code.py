from __future__ import annotations

from pathlib import Path

import pytest

import prerank_tools
from prerank_tools import cuda_code
from prerank_tools.errors import UsageError

PACKAGE = Path(prerank_tools.__file__).parent


def test_a_kernel_is_compiled_once_for_all_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built = []

    def compile_(text: str, name: str, defines: dict[str, int], architecture: str) -> bytes:
        built.append((name, dict(defines), architecture))
        return f"{text} {defines}".encode()

    head, source = tmp_path / "head.cuh", tmp_path / "own.cu"
    head.write_text("head")
    source.write_text("own")
    monkeypatch.setattr(cuda_code, "_compile", compile_)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for levels, card in ((3, "sm_90a"), (3, "sm_90a"), (2, "sm_90a"), (2, "sm_80")):
        code = cuda_code._compiled((head, source), {"LEVELS": levels}, card).decode()
        assert code == f"head\nown {{'LEVELS': {levels}}}"
    assert built == [
        ("own.cu", {"LEVELS": 3}, "sm_90a"),
        ("own.cu", {"LEVELS": 2}, "sm_90a"),
        ("own.cu", {"LEVELS": 2}, "sm_80"),
    ]
    source.write_text("changed")
    assert cuda_code._compiled((source,), {"LEVELS": 2}, "sm_90a").startswith(b"changed")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nothing can be kept there
    assert cuda_code._compiled((source,), {"LEVELS": 1}, "sm_90a")


def test_without_cuda_bindings_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_code, "available", lambda: False)
    with pytest.raises(UsageError, match="cuda-bindings"):
        cuda_code.kernel((PACKAGE / "any.cu",), "any")


def test_every_kernel_is_named_by_the_code_that_compiles_it() -> None:
    kernels = [path for path in PACKAGE.rglob("*") if path.suffix in (".cu", ".cuh")]
    assert kernels
    for path in kernels:
        folder = path.parent if path.parent.name != "hopper" else path.parent.parent
        assert any(f'"{path.name}"' in code.read_text() for code in folder.glob("*.py")), path
