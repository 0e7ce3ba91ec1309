"""Scores of several runs as one, and of several seeds.

  waic        mean of −log p + variance of log p over the runs, minus the WAIC of Choi, Jang & Alemi 2018,
              arXiv:1810.01392, eq. 1
  any other   mean over the runs of (score − mean) / deviation, both of held-out images

Runs are made comparable by means and deviations, as their ranks among held-out images would all be equal for
every image that is stranger than those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Table = Mapping[str, np.ndarray]  # float64 [N] of each score

WAIC = "waic"


def computed_for(names: Sequence[str]) -> list[str]:
    """The scores that each run computes for some scores: `nll` in the place of `waic`."""
    return list(dict.fromkeys("nll" if name == WAIC else name for name in names))


def combined(
    members: Sequence[Mapping[str, Table]], names: Sequence[str], reference: str
) -> dict[str, dict[str, np.ndarray]]:
    """The scores of every pick by all runs together, without the reference; of a single run its own."""
    picks = [pick for pick in members[0] if pick != reference]
    if len(members) == 1:
        return {pick: dict(members[0][pick]) for pick in picks}
    return {pick: {name: _one(members, pick, name, reference) for name in names} for pick in picks}


def waic(nll: np.ndarray) -> np.ndarray:
    """−(E[log p] − Var[log p]) over the runs, float64 [N], of −log p by each of them, [runs, N] nats."""
    return nll.mean(0) + nll.var(0)


def mean_over_seeds(tables: Sequence[Table]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The mean of each score over the seeds and its deviation, [N] each; no deviations of one seed."""
    stacked = {name: np.stack([table[name] for table in tables]) for name in tables[0]}
    means = {name: values.mean(0) for name, values in stacked.items()}
    several = stacked if len(tables) > 1 else {}
    return means, {name: values.std(0, ddof=1) for name, values in several.items()}


def _one(members: Sequence[Mapping[str, Table]], pick: str, name: str, reference: str) -> np.ndarray:
    if name == WAIC:
        return waic(np.stack([member[pick]["nll"] for member in members]))
    return np.mean([_standard(member[pick][name], member[reference][name]) for member in members], 0)


def _standard(scores: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Scores in deviations from the mean of held-out ones; 0 where these are all alike."""
    return (scores - held_out.mean()) / (held_out.std() or np.inf)
