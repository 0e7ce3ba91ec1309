"""Optimizers by name and learning rates as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, Adamax, AdamW, Optimizer, RMSprop

from gzcli.engine.muon import Muon
from gzcli.errors import MissingError, UsageError, did_you_mean
from gzcli.models.base import Phase

PLAIN = ("name", "lr", "betas", "eps", "weight_decay", "warmup", "schedule")


def settings(optim: Mapping[str, Any], phases: list[Phase]) -> dict[str, dict[str, Any]]:
    """Each phase's optimizer settings: the section's own, with what stands under the phase's name over them.

    Raises UsageError for a sub-section that names no phase.
    """
    names = [phase.name for phase in phases]
    for key, value in optim.items():
        if isinstance(value, Mapping) and key not in names:
            hint = did_you_mean(key, names) or f"its phases are: {', '.join(names)}"
            raise UsageError(f"`optim.{key}` names no phase of this model", hint=hint)
    common = {key: optim[key] for key in PLAIN}
    return {name: common | dict(optim.get(name) or {}) for name in names}


def build(phase: Phase, conf: Mapping[str, Any], model: nn.Module | None = None) -> Optimizer:
    """The phase's optimizer; multi-tensor or fused, so that a step costs the same for 10 parameters and for
    1,000.

    model: what the phase is a part of, whose layers tell Muon which parameters are matrices.
    """
    groups = []
    for group in phase.groups():
        scale = group.get("lr_scale", 1.0)
        groups.append(
            {"lr": conf["lr"] * scale, "weight_decay": conf["weight_decay"], **group, "lr_scale": scale}
        )
    betas, eps = tuple(map(float, conf["betas"])), conf["eps"]
    fused = phase.parameters()[0].device.type in ("cpu", "cuda")
    match conf["name"]:
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
            return SGD(groups, lr=conf["lr"], momentum=betas[0], fused=fused)
        case "rmsprop":
            return RMSprop(groups, alpha=betas[1], eps=eps, foreach=True)
    raise UsageError(
        f"no optimizer is called `{conf['name']}`",
        hint="adam · adamw · adamw8bit · muon · adamax · sgd · rmsprop",
    )


def adamw8bit(groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> Optimizer:
    """AdamW with moments of 8 bits (Dettmers 2022, arXiv:2110.02861): a quarter of the memory. Raises
    MissingError."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as e:
        hint = "`pip install bitsandbytes`, or `--set optim.name=adamw`"
        raise MissingError("`optim.name: adamw8bit` needs the package `bitsandbytes`", hint=hint) from e
    return AdamW8bit(groups, betas=betas, eps=eps)


def factor(conf: Mapping[str, Any], step: int, steps: int) -> float:
    """What the learning rate is multiplied by at `step` of `steps`: linear warm-up, then the schedule.

    The warm-up is a fifth of a short run: one of 200 steps would be all that a run of 27 has.
    """
    warmup = min(conf["warmup"], steps // 5)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    match conf["schedule"]:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            return 1 - done
        case "late_linear":  # constant over the first half
            return min(1.0, 2 * (1 - done))
    return 1.0


def set_lr(optimizer: Optimizer, conf: Mapping[str, Any], step: int, steps: int) -> float:
    lr = conf["lr"] * factor(conf, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr


def clip(params: list[torch.nn.Parameter], limit: float | None) -> torch.Tensor | None:
    """Clips the total norm of the gradients to `limit`; returns the norm before, without a host sync."""
    return torch.nn.utils.clip_grad_norm_(params, limit, foreach=True) if limit else None
