"""CUDA C++ compiled as the program runs, by the compiler library that PyTorch brings."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from prerank_tools.errors import UsageError

BYTES = ctypes.c_byte * 128  # of a tensor map


@cache
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
        """Start on the current stream; ctypes values are taken by value, tensors as where their data is."""
        from cuda.bindings import driver

        if not blocks:
            return
        values = [_argument(argument) for argument in arguments]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = torch.cuda.current_stream().cuda_stream
        _checked(
            driver.cuLaunchKernel(
                self.handle, blocks, 1, 1, threads, 1, 1, self.shared, stream, ctypes.addressof(places), 0
            )
        )


def kernel(sources: tuple[Path, ...], name: str, shared: int = 0, **defines: int) -> Kernel:
    """A function of these files, read one after the other, for the current card; compiled once a process.

    Raises UsageError without NVIDIA's bindings, RuntimeError with the compiler's words.
    """
    if not available():
        raise UsageError("a GPU kernel needs cuda-bindings", "pip install cuda-bindings")
    return _loaded(torch.cuda.current_device(), sources, name, shared, tuple(sorted(defines.items())))


@cache
def _loaded(
    card: int, sources: tuple[Path, ...], name: str, shared: int, defines: tuple[tuple[str, int], ...]
) -> Kernel:
    from cuda.bindings import driver

    torch.cuda.current_stream().synchronize()  # the context that modules are loaded into is then there
    module = _checked(driver.cuModuleLoadData(_compiled(sources, dict(defines), architecture(card))))
    handle = _checked(driver.cuModuleGetFunction(module, name.encode()))
    if shared:
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(handle, limit, shared))
    return Kernel(handle, shared)


def architecture(card: int) -> str:
    """`sm_90a` on Hopper, whose own instructions want the `a`; the plain name elsewhere."""
    major, minor = torch.cuda.get_device_capability(card)
    return f"sm_{major}{minor}" + ("a" if major == 9 else "")


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether a card has Hopper's own instructions, which later generations lack again."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def _compiled(sources: tuple[Path, ...], defines: dict[str, int], architecture: str) -> bytes:
    """Machine code, from the user's cache where it was compiled before: that takes seconds."""
    text = "\n".join(source.read_text() for source in sources)
    known = f"{torch.version.cuda} {architecture} {sorted(defines.items())}\n{text}"
    name = f"{hashlib.sha256(known.encode()).hexdigest()}.cubin"
    with contextlib.suppress(OSError, RuntimeError):
        return (_cache() / name).read_bytes()
    code = _compile(text, sources[-1].name, defines, architecture)
    with contextlib.suppress(OSError, RuntimeError):  # no home, or one not to be written to, costs time only
        _cache().mkdir(parents=True, exist_ok=True)
        mine = _cache() / f"{name}.{os.getpid()}"
        mine.write_bytes(code)
        mine.replace(_cache() / name)
    return code


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prerank"


def _compile(text: str, name: str, defines: dict[str, int], architecture: str) -> bytes:
    from cuda.bindings import nvrtc

    options = [
        f"-arch={architecture}".encode(),
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
    """How Hopper's copy engine reads boxes (rows, dims) of a contiguous float16 or float32 matrix.

    Rows of 128 bytes land swizzled, others as they are; beyond the matrix lie zeros.
    """
    from cuda.bindings import driver

    kinds, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
    types = {
        torch.float16: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        torch.float32: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    }
    (n, width), size = x_nD.shape, x_nD.element_size()
    swizzle = (
        swizzles.CU_TENSOR_MAP_SWIZZLE_128B if dims * size == 128 else swizzles.CU_TENSOR_MAP_SWIZZLE_NONE
    )
    made = _checked(
        driver.cuTensorMapEncodeTiled(
            types[x_nD.dtype],
            2,
            x_nD.data_ptr(),
            [driver.cuuint64_t(width), driver.cuuint64_t(n)],
            [driver.cuuint64_t(-(-width * size // 16) * 16)],
            [driver.cuuint32_t(dims), driver.cuuint32_t(rows)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return BYTES.from_buffer_copy(ctypes.string_at(int(made.getPtr()), 128))


def no_map() -> Any:
    """What a kernel that takes a tensor map is given on other cards."""
    return BYTES()


def _argument(value: Any) -> Any:
    """As a kernel takes it: `int` and `float` for Python's numbers, a pointer for a tensor."""
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, int):
        return ctypes.c_int(value)
    return ctypes.c_float(value) if isinstance(value, float) else value


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a call of the bindings; raises RuntimeError where it reports a fault."""
    fault, *values = result
    if int(fault) != 0:
        raise RuntimeError(str(fault))
    return values[0] if values else None
