"""What `gpu_gsu.py` checks before it times: hard small cases, and rows of the timed shapes, in float64."""

from __future__ import annotations

import numpy as np
import torch

from prerank_tools.gsu import search_cuda as gsu
from prerank_tools.gsu.cosine import LANES
from prerank_tools.gsu.search import Groups, TopK, topk_numpy
from prerank_tools.gsu.simtier import simtier

K = 50
PLANS = {
    "to the last bit": gsu.Plan(),
    "cosines within 1e-6": gsu.Plan(last_bit=False),
    "as on any card": gsu.Plan(hopper=False),
}


def check() -> list[str]:
    """Small hard cases against the numpy definition, through the whole of `topk_cuda`."""
    rng = np.random.default_rng(0)
    cases = {}
    for dtype in (np.float32, np.float16, np.int8):
        table = (rng.normal(size=(900, 128)) * (40 if dtype is np.int8 else 1)).astype(dtype)
        table[:9] = 0
        cases[f"random {np.dtype(dtype).name}, ragged, missing"] = (table, ragged(rng, 900))
    close = (rng.normal(size=128) + rng.normal(size=(1200, 128)) * 1e-4).astype(np.float32)
    cases["near ties"] = (close, ragged(rng, 1200))
    cases["small integers, mostly ties and zeros"] = (
        (rng.integers(-1, 2, (60, 128)) * (np.arange(128) < 9)).astype(np.int8),
        ragged(rng, 60),
    )
    large = rng.normal(size=(900, 128))
    large[::3] *= 1e30
    cases["lengths float32 cannot square"] = (large.astype(np.float32), ragged(rng, 900))
    lines = ["| case | rows | positions | n_valid | tiers | worst cosine |", "|---|---|---|---|---|---|"]
    for name, (table, groups) in cases.items():
        expected = topk_numpy(table, groups, k=K)
        equal, worst = np.zeros(3, dtype=int), 0.0
        for plan in PLANS.values():
            differ, away = apart(gsu.topk_cuda(table, groups, k=K, plan=plan), expected)
            equal, worst = equal + differ, max(worst, away)
        counts = " | ".join(f"{count} differ" for count in equal)
        lines.append(f"| {name} | {len(expected.n_valid_M)} | {counts} | {worst:.1e} |")
        print(lines[-1], flush=True)
        assert not equal.any() and worst < 1e-5, (name, equal, worst)
    return [*lines, "", f"Counts add up what differs over the {len(PLANS)} plans below.", ""]


def apart(found: TopK, expected: TopK) -> tuple[np.ndarray, float]:
    """How many positions, counts and tiers differ, and the most that a cosine does."""
    pairs = (
        (found.positions_MK, expected.positions_MK),
        (found.n_valid_M, expected.n_valid_M),
        (simtier(found.sims_MK), simtier(expected.sims_MK)),
    )
    worst = np.abs(found.sims_MK - expected.sims_MK).max()
    return np.array([int((a != b).sum()) for a, b in pairs]), float(worst)


def ragged(rng: np.random.Generator, rows: int) -> Groups:
    """A few users with histories of all lengths, candidates that see any prefix."""
    history, asked = rng.integers(0, 9000, 9), rng.integers(0, 40, 9)
    history[:3] = (1, 50, 200)
    visible = np.concatenate([rng.integers(0, n + 1, c) for n, c in zip(history, asked, strict=True)])
    return Groups(
        rng.integers(-1, rows, history.sum()), np.r_[0, history.cumsum()],
        rng.integers(-1, rows, asked.sum()), np.r_[0, asked.cumsum()], visible,
    )  # fmt: skip


def verify(past: gsu.Past, asked: gsu.Asked, plan: gsu.Plan, *, rows: int = 256) -> None:
    """A sample of the timed rows against float64 on the GPU."""
    found = gsu.search(past, asked, k=K, plan=plan, tiers=True)
    counted = gsu.search(past, asked, k=K, plan=plan, lists=False, tiers=True)
    for row in torch.randint(0, len(asked.group_M), (rows,)).tolist():
        best, sims = reference(past, asked, row)
        assert (found.positions_MK[row] == best).all(), row
        assert (found.sims_MK[row] - sims).abs().max() <= (0 if plan.last_bit else 1e-6)
        assert found.n_valid_M[row] == counted.n_valid_M[row] == int(past.offsets[1] - past.offsets[0])
        tiers = simtier(sims.cpu().numpy()[None])[0].tolist()
        assert found.tier_MN[row].tolist() == counted.tier_MN[row].tolist() == tiers


def reference(past: gsu.Past, asked: gsu.Asked, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition for a candidate that sees all of a history without gaps: positions, float32 cosines."""
    group = int(asked.group_M[row])
    seen = slice(int(past.offsets[group]), int(past.offsets[group + 1]))
    x_nSL = past.rows.raw_ND[seen].double().view(seen.stop - seen.start, -1, LANES)
    y_SL = asked.rows.raw_ND[row].double().view(-1, LANES)
    total_nL = x_nSL[:, 0] * y_SL[0]
    for step in range(1, len(y_SL)):
        total_nL = total_nL + x_nSL[:, step] * y_SL[step]
    while total_nL.shape[1] > 1:
        half = total_nL.shape[1] // 2
        total_nL = total_nL[:, :half] + total_nL[:, half:]
    sims_n = total_nL[:, 0] * asked.rows.inverse_N[row] * past.rows.inverse_N[seen]
    later_first = torch.sort(sims_n.flip(0), descending=True, stable=True).indices[:K]
    best = len(sims_n) - 1 - later_first
    return best, sims_n[best].float()
