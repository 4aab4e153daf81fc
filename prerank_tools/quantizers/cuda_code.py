"""CUDA C++ compiled as the program runs, by the compiler library that PyTorch brings."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

FOLDER = "hopper"


def available() -> bool:
    """Whether NVIDIA's bindings, which PyTorch for CUDA depends on since 2.10, are there."""
    return (
        importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None
    )


class Kernel:
    """A compiled kernel with the shared memory of its blocks, in bytes."""

    def __init__(self, handle: Any, shared: int) -> None:
        self.handle, self.shared = handle, shared

    def launch(self, blocks: int, threads: int, *arguments: Any) -> None:
        """Start on the current stream; arguments are ctypes structures or arrays, taken by value."""
        from cuda.bindings import driver

        places = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        stream = torch.cuda.current_stream().cuda_stream
        _checked(
            driver.cuLaunchKernel(
                self.handle, blocks, 1, 1, threads, 1, 1, self.shared, stream, ctypes.addressof(places), 0
            )
        )


def kernel(sources: tuple[str, ...], name: str, shared: int, **defines: int) -> Kernel:
    """Compile for the current card, once a process; raises RuntimeError with the compiler's words."""
    return _loaded(torch.cuda.current_device(), sources, name, shared, tuple(defines.items()))


@cache
def _loaded(
    card: int, sources: tuple[str, ...], name: str, shared: int, defines: tuple[tuple[str, int], ...]
) -> Kernel:
    from cuda.bindings import driver

    torch.cuda.current_stream().synchronize()  # the context that modules are loaded into is then there
    module = _checked(driver.cuModuleLoadData(_compiled(sources, dict(defines))))
    handle = _checked(driver.cuModuleGetFunction(module, name.encode()))
    if shared:
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(handle, limit, shared))
    return Kernel(handle, shared)


def _compiled(sources: tuple[str, ...], defines: dict[str, int]) -> bytes:
    """Machine code, from the user's cache where it was compiled before: that takes seconds."""
    folder = files("prerank_tools.quantizers") / FOLDER
    text = "\n".join((folder / source).read_text() for source in sources)
    known = f"{torch.version.cuda} {sorted(defines.items())}\n{text}"
    name = f"{hashlib.sha256(known.encode()).hexdigest()}.cubin"
    with contextlib.suppress(OSError, RuntimeError):
        return (_cache() / name).read_bytes()
    code = _compile(text, sources[-1], defines)
    with contextlib.suppress(OSError, RuntimeError):  # no home, or one not to be written to, costs time only
        _cache().mkdir(parents=True, exist_ok=True)
        mine = _cache() / f"{name}.{os.getpid()}"
        mine.write_bytes(code)
        mine.replace(_cache() / name)
    return code


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prerank"


def _compile(text: str, name: str, defines: dict[str, int]) -> bytes:
    from cuda.bindings import nvrtc

    options = [
        b"-arch=sm_90a",
        b"-std=c++17",
        *(f"-D{name}={value}".encode() for name, value in defines.items()),
    ]
    program = _checked(nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], []))
    try:
        _checked(nvrtc.nvrtcCompileProgram(program, len(options), options))
    except RuntimeError as fault:
        said = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, said)
        raise RuntimeError(said.decode(errors="replace")) from fault
    cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    return cubin


def tensor_map(x_nD: torch.Tensor, rows: int, dims: int) -> Any:
    """How the copy engine reads boxes (rows, dims) of a float16 matrix, swizzled by 128 bytes."""
    from cuda.bindings import driver

    n, width = x_nD.shape
    made = _checked(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            2,
            x_nD.data_ptr(),
            [driver.cuuint64_t(width), driver.cuuint64_t(n)],
            [driver.cuuint64_t(2 * width)],
            [driver.cuuint32_t(dims), driver.cuuint32_t(rows)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return (ctypes.c_byte * 128).from_buffer_copy(ctypes.string_at(int(made.getPtr()), 128))


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a call of the bindings; raises RuntimeError where it reports a fault."""
    fault, *values = result
    if int(fault) != 0:
        raise RuntimeError(str(fault))
    return values[0] if values else None
