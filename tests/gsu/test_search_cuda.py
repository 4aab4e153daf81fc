"""The GPU search gives the positions and tiers of the definition (also run by benchmarks/gpu_gsu.py)."""

from __future__ import annotations

import numpy as np
import pytest

from prerank_tools.gsu.search import topk, topk_numpy
from prerank_tools.gsu.simtier import simtier
from tests.gsu.test_search import random_groups

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_cuda_gives_the_definition(dtype: type) -> None:
    rng = np.random.default_rng(0)
    table = (rng.normal(size=(300, 40)) * (40 if dtype is np.int8 else 1)).astype(dtype)
    table[:5] = 0
    groups = random_groups(rng, len(table), longest=5000)
    found, expected = topk(table, groups, k=20, backend="cuda"), topk_numpy(table, groups, k=20)
    np.testing.assert_array_equal(found.positions_MK, expected.positions_MK)
    np.testing.assert_array_equal(found.n_valid_M, expected.n_valid_M)
    np.testing.assert_array_equal(simtier(found.sims_MK), simtier(expected.sims_MK))
    np.testing.assert_allclose(found.sims_MK, expected.sims_MK, atol=1e-5)
    np.testing.assert_allclose(found.recent_MS, expected.recent_MS, atol=1e-5)
