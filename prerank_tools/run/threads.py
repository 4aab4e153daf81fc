"""Fix the threads a worker computes with: another number can change the last bits of a sum."""

from __future__ import annotations

import os
import sys


def take_gpu() -> None:
    """Compute on the GPU of this worker's number: as many workers as GPUs use each of them once."""
    import torch

    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def fix_threads(threads: int) -> None:
    """Set torch, faiss, numba and OpenMP to `threads`, those loaded already and those loaded later."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(threads)
    if "numba" in sys.modules:
        numba = sys.modules["numba"]
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
