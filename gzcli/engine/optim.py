"""Optimizers by name and learning rates as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, Adamax, AdamW, Optimizer, RMSprop

from gzcli.core import ranks
from gzcli.core.devices import kind_of
from gzcli.core.errors import MissingError, UsageError, did_you_mean
from gzcli.core.sections import OptimSection
from gzcli.engine.muon import Muon
from gzcli.models.base import Phase


def settings(section: OptimSection, phases: list[Phase]) -> dict[str, OptimSection]:
    """The settings of each phase: those of the section, some replaced by the keys under the phase's name.

    Raises UsageError for the name of no phase.
    """
    names = [phase.name for phase in phases]
    for name in section.phases:
        if name not in names:
            hint = did_you_mean(name, names) or f"its phases are: {', '.join(names)}"
            raise UsageError(f"`optim.{name}` names no phase of this model", hint=hint)
    return {name: section.of(name) for name in names}


def build(phase: Phase, conf: OptimSection, model: nn.Module | None = None) -> Optimizer:
    """The phase's optimizer, multi-tensor or fused: a step of 1,000 parameters costs as much as one of 10.

    phase: the phase.
    conf: its settings.
    model: the model of the phase, by whose layers Muon knows the parameters that are matrices.

    Raises UsageError for an unknown name, MissingError where its package is missing.
    """
    groups = []
    for group in phase.groups():
        scale = group.get("lr_scale", 1.0)
        groups.append({"lr": conf.lr * scale, "weight_decay": conf.weight_decay, **group, "lr_scale": scale})
    betas, eps = (float(conf.betas[0]), float(conf.betas[1])), conf.eps
    fused = kind_of(phase.parameters()[0].device).fused
    match conf.name:
        case "adam":
            return Adam(groups, betas=betas, eps=eps, fused=fused)
        case "adamw":
            return AdamW(groups, betas=betas, eps=eps, fused=fused)
        case "adamw8bit":
            return adamw8bit(groups, betas, eps)
        case "muon":
            return Muon(groups, betas, eps, model)
        case "adamax":
            return Adamax(groups, betas=betas, eps=eps, foreach=True)
        case "sgd":
            return SGD(groups, lr=conf.lr, momentum=betas[0], fused=fused)
        case "rmsprop":
            return RMSprop(groups, alpha=betas[1], eps=eps, foreach=True)
    raise UsageError(
        f"no optimizer is called `{conf.name}`",
        hint="adam · adamw · adamw8bit · muon · adamax · sgd · rmsprop",
    )


def adamw8bit(groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> Optimizer:
    """AdamW with moments of 8 bits (Dettmers 2022, arXiv:2110.02861): a quarter of the memory.

    Raises MissingError.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as e:
        hint = "`pip install bitsandbytes`, or `--set optim.name=adamw`"
        raise MissingError("`optim.name: adamw8bit` needs the package `bitsandbytes`", hint=hint) from e
    return AdamW8bit(groups, betas=betas, eps=eps)


def factor(conf: OptimSection, step: int, steps: int) -> float:
    """The factor of the learning rate at `step` of `steps`: linear warm-up, then the schedule.

    The warm-up takes at most half of the run. Where that cuts it, the rate rises as steeply as in a long run
    and so stays below the full one, at which a flow diverges from its first steps.
    """
    warmup = min(conf.warmup, max(steps // 2, 1))
    if step < warmup:
        return (step + 1) / conf.warmup
    peak = warmup / conf.warmup if warmup else 1.0
    done = (step - warmup) / max(steps - warmup, 1)
    match conf.schedule:
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            return peak * (1 - done)
        case "late_linear":  # constant over the first half
            return peak * min(1.0, 2 * (1 - done))
    return peak


def set_lr(optimizer: Optimizer, conf: OptimSection, step: int, steps: int) -> None:
    """Sets the learning rate of `step` of `steps`, each group's by its own scale."""
    lr = conf.lr * factor(conf, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def restore(optimizer: Optimizer, values: dict[str, Any]) -> None:
    """Gives an optimizer its state. What has the shape of a parameter gets its order in memory too, which
    fused kernels want: a checkpoint may come from a device where convolutions lie otherwise."""
    optimizer.load_state_dict(values)
    for p, own in optimizer.state.items():
        for key, value in own.items():
            if isinstance(value, torch.Tensor) and value.shape == p.shape and value.stride() != p.stride():
                own[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def clip(params: list[torch.nn.Parameter], limit: float | None) -> torch.Tensor | None:
    """Clips the total norm of the gradients to `limit`; returns the norm before, without a host sync."""
    return ranks.whole(torch.nn.utils.clip_grad_norm_(params, limit, foreach=True)) if limit else None


def may_step(norm: torch.Tensor | None) -> bool:
    """Whether the optimizer may take a step by gradients of this norm: one bad batch should not end a run.

    norm: None: not known. On a GPU nothing is asked, as the host would have to wait for the answer.
    """
    return norm is None or kind_of(norm.device).queued or bool(torch.isfinite(norm))
