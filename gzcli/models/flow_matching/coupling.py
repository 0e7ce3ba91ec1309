"""Minibatch optimal transport — Tong et al. 2023, "Improving and generalizing flow-based generative models with minibatch
optimal transport", arXiv:2302.00482, section 3.2: paths between near pairs of noise and data cross less, and are straighter."""

from __future__ import annotations

import torch
from torch import Tensor

from gzcli.models.nn import all_rows


@torch.no_grad()
def coupled(x0: Tensor, x1: Tensor) -> Tensor:
    """The noises x0 [B, …] in the order that pairs them with the data x1 [B, …] at the least total squared distance.

    Over the rows of all ranks: which noise an image gets does not depend on how many processes share the batch.
    """
    from scipy.optimize import linear_sum_assignment

    noise, data = all_rows(x0), all_rows(x1)
    cost = torch.cdist(data.flatten(1).double(), noise.flatten(1).double()).square()
    order = torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]).to(x0.device)
    rank = torch.distributed.get_rank() if len(noise) > len(x0) else 0
    return noise[order[rank * len(x0) : (rank + 1) * len(x0)]]
