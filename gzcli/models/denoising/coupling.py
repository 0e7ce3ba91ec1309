"""Minibatch optimal transport — Tong et al. 2023, "Improving and generalizing flow-based generative models
with minibatch optimal transport", arXiv:2302.00482, section 3.2: paths between near pairs of noise and data
cross less, and are straighter."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core import ranks
from gzcli.models.nn import full_fp32, to_fp32


@torch.no_grad()
def coupled(x0: Tensor, x1: Tensor, y: Tensor | None, module: nn.Module) -> Tensor:
    """The noises x0 [B, …] in the order that pairs them with the data x1 [B, …] at the least total squared
    distance.

    Noises are paired within the images of each label y, [B] or [B, K]. Otherwise the noise of a class would
    be the noise near that class, and not N(0, I), from which its samples start (Cheng & Schwing 2025,
    arXiv:2503.10636). While `module` trains, the rows of all ranks are paired, so that the noise of an image
    does not depend on the number of processes.

    The assignment is exact and runs on the CPU. A step waits for the device once, and then takes 10 ms for
    256 images of MNIST and 50 ms for 512; with ten labels 3 and 8 ms.
    """
    from scipy.optimize import linear_sum_assignment

    noise, data = ranks.rows(x0, module), ranks.rows(x1, module)
    with full_fp32(x0.device):  # ‖x1‖² and ‖x0‖² are the same in every order
        product = to_fp32(data).flatten(1) @ to_fp32(noise).flatten(1).mT
    cost, order = -product.cpu().numpy(), np.arange(len(noise))
    for rows in rows_by_label(None if y is None else ranks.rows(y, module), len(noise)):
        order[rows] = rows[linear_sum_assignment(cost[np.ix_(rows, rows)])[1]]
    own = ranks.own_rows(torch.from_numpy(order), module)
    return noise[own.to(x0.device)]


def rows_by_label(labels: Tensor | None, n: int) -> list[np.ndarray]:
    """The positions of the rows of each label, or set of labels; without labels, of all n rows."""
    if labels is None:
        return [np.arange(n)]
    which = np.unique(labels.cpu().numpy(), axis=0, return_inverse=True)[1].reshape(n)
    return [np.flatnonzero(which == k) for k in range(which.max() + 1)]
