"""CUDA C++ kernels compiled when first used, by the compiler that torch brings along: no toolkit needed."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prerank_tools.errors import UsageError

HERE = Path(__file__).parent


class Kernel:
    """One compiled function: `kernel(blocks, threads, *arguments, shared=bytes)` on torch's current stream.

    Tensors are passed as pointers, Python ints as `int`, floats as `float`, tile maps by value.
    """

    def __init__(self, function: Any) -> None:
        self._function, self._shared = function, 0

    def __call__(self, blocks: int, threads: int, *arguments: Any, shared: int = 0) -> None:
        from cuda.bindings import driver

        if not blocks:
            return
        if shared > max(self._shared, 48 << 10):
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(self._function, attribute, shared))
            self._shared = shared
        values, types = zip(*map(_argument, arguments), strict=True)
        stream = torch.cuda.current_stream().cuda_stream
        _checked(
            driver.cuLaunchKernel(
                self._function, blocks, 1, 1, threads, 1, 1, shared, stream, (values, types), 0
            )
        )


@lru_cache(maxsize=64)
def compiled(files: tuple[str, ...], name: str, defines: tuple[tuple[str, int], ...], device: int) -> Kernel:
    """`name` of these files of this folder, read one after the other, for the card of this number."""
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as fault:
        raise UsageError("a GPU search needs cuda-bindings", "pip install cuda-bindings") from fault
    source = "\n".join((HERE / file).read_text() for file in files).encode()
    program = _checked(nvrtc.nvrtcCreateProgram(source, files[-1].encode(), 0, [], []))
    options = [f"--gpu-architecture={architecture(device)}", "--std=c++17"]
    words = [option.encode() for option in options + [f"-D{key}={value}" for key, value in defines]]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(words), words)
    if int(status):
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{files[-1]} does not compile: {log.decode(errors='replace')}")
    code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    torch.cuda.init()
    torch.zeros(1, device=f"cuda:{device}")  # torch's context is the one to load into
    module = _checked(driver.cuModuleLoadData(code))
    return Kernel(_checked(driver.cuModuleGetFunction(module, name.encode())))


def architecture(device: int) -> str:
    """`sm_90a` on Hopper, whose own instructions want the `a`; the plain name elsewhere."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major == 9 else "")


@lru_cache(maxsize=64)
def is_hopper(device: torch.device) -> bool:
    """Whether a card has Hopper's own instructions, which later generations lack again."""
    return torch.cuda.get_device_capability(device)[0] == 9


def tile_map(x: Tensor, rows: int, columns: int) -> Any:
    """What Hopper's copy engine needs to fetch tiles of a contiguous matrix; beyond its end lie zeros.

    Rows of 128 bytes land swizzled, longer ones as they are.
    """
    from cuda.bindings import driver

    kinds, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
    types = {
        torch.float16: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        torch.float32: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    }
    short = columns * x.element_size() == 128
    return _checked(
        driver.cuTensorMapEncodeTiled(
            types[x.dtype],
            2,
            x.data_ptr(),
            [driver.cuuint64_t(x.shape[1]), driver.cuuint64_t(x.shape[0])],
            [driver.cuuint64_t(-(-x.shape[1] * x.element_size() // 16) * 16)],
            [driver.cuuint32_t(columns), driver.cuuint32_t(rows)],
            [driver.cuuint32_t(1)] * 2,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzles.CU_TENSOR_MAP_SWIZZLE_128B if short else swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def no_map() -> Any:
    """What a kernel that takes a tile map is given on other cards."""
    from cuda.bindings import driver

    return driver.CUtensorMap()


def _argument(value: Any) -> tuple[Any, Any]:
    if isinstance(value, Tensor):
        return value.data_ptr(), ctypes.c_void_p
    if isinstance(value, float):
        return value, ctypes.c_float
    return value, ctypes.c_int if isinstance(value, int) else None


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a CUDA call gave, or the error it named."""
    if int(answer[0]):
        raise RuntimeError(f"CUDA says {answer[0]!r}")
    return answer[1] if len(answer) > 1 else None
