"""Optimizers by name, and learning rates as a pure function of the step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import SGD, Adam, Adamax, AdamW, Optimizer, RMSprop
from torch.optim.adamw import adamw

from gzcli.core import ranks
from gzcli.core.devices import device_kind
from gzcli.core.errors import MissingError, UsageError, did_you_mean, install_line
from gzcli.core.hints import advice, setting
from gzcli.core.sections import SCHEDULES, OptimSection
from gzcli.models.base import Phase
from gzcli.models.nn import is_shape_only

MIN_MATRIX_SIDE = 32  # matrices with fewer rows or columns are updated by AdamW
MUON_MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at 0, and keeps singular values between .5 and 1.5
GRAM_STEPS = (3, 2)  # steps of iterating x xᵀ; with all 5 at once, small singular values are off by 1e-4
NEWTON_SCHULZ_STEPS = sum(GRAM_STEPS)  # steps of the Newton–Schulz iteration
LONG_RATIO = (
    3  # columns for each row from which x xᵀ is faster: 1.2 times on a CPU, by 9 1.8 times, by 18 2.1
)
RMS = 0.2  # root mean square of an update by AdamW, roughly (Liu 2025, section 2.2)


def phase_settings(
    section: OptimSection, phases: list[Phase], possible: Collection[str] = ()
) -> dict[str, OptimSection]:
    """The settings of each phase: the section, overridden by the keys under the phase's name.

    possible: phases that the model has on other data, such as the classifier of `diffae` with labels.
    """
    names = [phase.name for phase in phases]
    for name in section.phases:
        if name not in (*names, *possible):
            hint = did_you_mean(name, names) or f"its phases are: {', '.join(names)}"
            raise UsageError(f"this model has no phase `{name}` for `optim.{name}`", hint=hint)
    return {name: section.of(name) for name in names}


def build(
    phase: Phase, conf: OptimSection, model: nn.Module | None = None, precision: str = "fp32"
) -> Optimizer:
    """The phase's optimizer. It is multi-tensor or fused, so a step with 1,000 small tensors costs about as
    much as one with 10. `precision`: the precision of the run's losses, in which Muon iterates."""
    groups = []
    for group in phase.groups():
        scale = group.get("lr_scale", 1.0)
        groups.append({"lr": conf.lr * scale, "weight_decay": conf.weight_decay, **group, "lr_scale": scale})
    betas, eps = (float(conf.betas[0]), float(conf.betas[1])), conf.eps
    fused = device_kind(phase.parameters()[0].device).fused
    optimizers: dict[str, Callable[..., Optimizer]] = {
        "adam": partial(Adam, betas=betas, eps=eps, fused=fused),
        "adamw": partial(AdamW, betas=betas, eps=eps, fused=fused),
        "adamw8bit": partial(adamw8bit, betas=betas, eps=eps),
        "muon": partial(Muon, betas=betas, eps=eps, model=model, bf16=precision == "bf16"),
        "adamax": partial(Adamax, betas=betas, eps=eps, foreach=True),
        "sgd": partial(SGD, momentum=betas[0], fused=fused),
        "rmsprop": partial(RMSprop, alpha=betas[1], eps=eps, foreach=True),
    }
    if conf.name not in optimizers:
        raise UsageError(f"no optimizer is called `{conf.name}`", hint=" · ".join(optimizers))
    return optimizers[conf.name](groups)


def adamw8bit(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    """AdamW with 8-bit moments, a quarter of the memory (Dettmers 2022, arXiv:2110.02861)."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as e:
        hint = advice(f"run `{install_line('bitsandbytes')}`, or use {{}}", setting("optim.name", "adamw"))
        raise MissingError("`optim.name: adamw8bit` needs the package `bitsandbytes`", hint=hint) from e
    return AdamW8bit(groups, **options)


def factor(conf: OptimSection, step: int, steps: int) -> float:
    """The factor of the learning rate at `step` of `steps`: linear warm-up, then the schedule. The warm-up
    takes at most half of the run. In a shorter run it keeps its slope and stops at a lower peak, because a
    flow diverges if it reaches the full rate too early."""
    warmup = min(conf.warmup, max(steps // 2, 1))
    if step < warmup:
        return (step + 1) / conf.warmup
    peak = warmup / conf.warmup if warmup else 1.0
    progress = (step - warmup) / max(steps - warmup, 1)
    return peak * SCHEDULES[conf.schedule](progress)


def set_lr(optimizer: Optimizer, conf: OptimSection, step: int, steps: int) -> None:
    """Sets the learning rate of `step` of `steps`, each group's by its own scale."""
    lr = conf.lr * factor(conf, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def clip(params: list[nn.Parameter], limit: float | None) -> Tensor:
    """Clips the total norm of the gradients to `limit`, if there is one. Returns the norm before clipping,
    without a host sync."""
    if limit:
        return ranks.whole(nn.utils.clip_grad_norm_(params, limit, foreach=True))
    grads = [p.grad for p in params if p.grad is not None]
    return ranks.whole(nn.utils.get_total_norm(grads, foreach=True))


def step(
    optimizer: Optimizer, params: list[nn.Parameter], norm: Tensor, scaler: Any, most: float | None
) -> None:
    """Takes a step unless the total norm of the gradients is above `most` or not finite, so that one bad
    batch does not end a run. On a GPU, the host waits for the norm only if there is a `most`, or if
    parameters are sharded."""
    take = optimizer.step if scaler is None else partial(scaler.step, optimizer)
    waits = most or not device_kind(norm.device).queued or ranks.is_sharded(params[0])
    if waits and not is_shape_only():  # a trial without values has no norm
        if scaler is not None or bool(norm <= most if most else norm.isfinite()):
            take()
        return
    if scaler is None:  # the scaler drops such gradients itself
        if isinstance(optimizer, Adam | AdamW | SGD) and optimizer.defaults.get("fused"):
            optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[union-attr]  # as a GradScaler does
        else:
            for p in params:
                p.grad = None if p.grad is None else torch.where(norm.isfinite(), p.grad, 0.0)
    take()


# ---------------------------------------------------------------------------- Muon


class Muon(Optimizer):
    """Muon for the weights of linear layers and convolutions, AdamW for all other parameters. AdamW updates
    biases, norms, embedding tables, first and last layers, and narrow matrices. Weight decay is decoupled in
    both."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        model: nn.Module | None,
        bf16: bool = False,
    ):
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        parts = list(split_groups(groups, matrices_of(model) if model else None))
        fused = device_kind(parts[0]["params"][0].device).fused
        super().__init__(parts, {"betas": betas, "eps": eps, "fused": fused})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is supported
        for group in self.param_groups:
            if grads := {p: p.grad for p in group["params"] if p.grad is not None}:
                update = self.orthogonal if group["wide"] else self.adamw
                update(list(grads), list(grads.values()), group)

    def orthogonal(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        """Updates each matrix separately, even if several share a parameter. Matrices of one size are
        batched."""
        moments = [self.state_of(p, "momentum") for p in params]
        torch._foreach_lerp_(moments, grads, 1 - MUON_MOMENTUM)
        ahead = torch._foreach_lerp(grads, moments, MUON_MOMENTUM)  # Nesterov's
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        counts = dict(zip(map(id, group["params"]), group["matrices"], strict=True))
        sizes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for p, a in zip(params, ahead, strict=True):
            for piece, update in zip(p.chunk(counts[id(p)]), a.chunk(counts[id(p)]), strict=True):
                sizes.setdefault((matrix := update.flatten(1)).shape, []).append((piece, matrix))
        for size, pairs in sizes.items():
            updates = orthogonalised(torch.stack([matrix for _, matrix in pairs]), self.dtype)
            for (piece, _), update in zip(pairs, updates, strict=True):
                piece.add_(update.view_as(piece), alpha=-group["lr"] * RMS * max(size) ** 0.5)

    def adamw(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        names = ("exp_avg", "exp_avg_sq", "step")
        means, squares, steps = ([self.state_of(p, name) for p in params] for name in names)
        values: dict[str, Any] = {key: group[key] for key in ("fused", "lr", "weight_decay", "eps")}
        values |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
        adamw(params, grads, means, squares, [], steps, amsgrad=False, maximize=False, **values)

    def state_of(self, p: Tensor, name: str) -> Tensor:
        """A state of p: a moving average of its gradients, or the number of its steps. It is zero at
        first."""
        state = self.state[p]
        if name not in state:
            scalar = torch.zeros((), device=p.device if self.defaults["fused"] else "cpu")
            state[name] = scalar if name == "step" else torch.zeros_like(p)
        return state[name]


def split_groups(groups: list[dict[str, Any]], counts: Mapping[int, int] | None) -> Iterator[dict[str, Any]]:
    """Splits each group into `wide` parameters and others, and records the number of `matrices` in each
    parameter."""
    for group in groups:
        count = {id(p): 1 if counts is None else counts.get(id(p), 0) for p in group["params"]}
        for wide in (True, False):
            if params := [p for p in group["params"] if is_wide(p, count[id(p)]) == wide]:
                yield {**group, "params": params, "wide": wide, "matrices": [count[id(p)] for p in params]}


def matrices_of(model: nn.Module) -> dict[int, int]:
    """The number of matrices in the weight of each linear layer and convolution: one, or what `nn.stacked`
    marked."""
    layers = (layer for layer in model.modules() if isinstance(layer, nn.Linear | _ConvNd))
    return {id(layer.weight): getattr(layer, "matrices", 1) for layer in layers}


def is_wide(p: Tensor, matrices: int = 1) -> bool:
    """Whether p [out, in, …] consists of matrices [out / matrices, rest] worth orthogonalizing."""
    return p.ndim >= 2 and matrices > 0 and min(len(p) // matrices, p[0].numel()) >= MIN_MATRIX_SIDE


def orthogonalised(g: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """For each matrix U S Vᵀ in g [N, rows, columns], the matrix U S′ Vᵀ with S′ close to 1. A quintic
    Newton–Schulz iteration computes it in the given dtype; float64 stays float64."""
    tall = g.shape[1] > g.shape[2]
    x = (g.mT if tall else g).to(torch.float64 if g.dtype == torch.float64 else dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if x.shape[2] >= LONG_RATIO * x.shape[1] and x.dtype != torch.bfloat16:
        for steps in GRAM_STEPS:
            x = newton_schulz_factor(x @ x.mT, steps) @ x
    else:
        a, b, c = QUINTIC
        for _ in range(NEWTON_SCHULZ_STEPS):
            s = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(g)


def newton_schulz_factor(s: Tensor, steps: int) -> Tensor:
    """The product of p = a + b s + c s² over the steps, for s = x xᵀ, where a step takes x to p x. All p
    commute, so the next s is p s p, and every product has the size of the smaller side of x."""
    factor = p = quintic(s)
    for _ in range(steps - 1):
        s = p @ (s @ p)
        p = quintic(s)
        factor = p @ factor
    return factor


def quintic(s: Tensor) -> Tensor:
    a, b, c = QUINTIC
    p = torch.baddbmm(s, s, s, beta=b, alpha=c)
    p.diagonal(dim1=1, dim2=2).add_(a)
    return p
