"""How loops become machine code: numba, without the GIL, kept on disk and dropped when a source changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.extending import intrinsic

# To a type checker an intrinsic is a call that also takes a typing context.
vector_code: Any = intrinsic


def kernel(
    function: Callable[..., Any] | None = None, *, inlined: bool = False, fastmath: set[str] | bool = False
) -> Any:
    """Compile without the GIL, kept on disk where there is a place for it (not in a read-only installation).

    `inlined` for what is called often: a call counts references to all its arrays, which takes 0.3 us.
    `fastmath`: which liberties LLVM may take with sums.
    """
    if function is None:
        return lambda function: kernel(function, inlined=inlined, fastmath=fastmath)
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    options |= {"forceinline": inlined, "fastmath": fastmath}
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(**options)(function)
    # Numba drops kept code when the function's own file changes; it also holds what files beside it say.
    with suppress(AttributeError):  # no public name: another numba may have none, and then only loses this
        kept = compiled._cache._cache_file
        kept._source_stamp = (kept._source_stamp, _digest(Path(function.__code__.co_filename).parent))
    return compiled


@cache
def _digest(folder: Path) -> str:
    """Of the sources in a folder, and of those here."""
    sources = sorted({*folder.glob("*.py"), *Path(__file__).parent.glob("*.py")})
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
