"""Class-conditional DDPM with classifier-free guidance — Ho & Salimans 2022, arXiv:2207.12598."""

from __future__ import annotations

from typing import Literal

from gzcli.models.diffusion.ddpm import DDPM
from gzcli.types import DataInfo


class CDDPM(DDPM):
    """`ddpm` that knows the label, hidden in a share `label_dropout` of training; the other keys are its."""

    paper = "Ho & Salimans 2022, arXiv:2207.12598"

    def __init__(
        self,
        data: DataInfo,
        *,
        channels: int = 32,
        mult: tuple[int, ...] = (1, 2, 2),
        layers: int = 1,
        attention: tuple[int, ...] = (7, 8),
        head_dim: int | None = None,
        dropout: float = 0.0,
        groups: int = 8,
        timesteps: int = 1000,
        schedule: Literal["linear", "cosine"] = "cosine",
        zero_snr: bool = False,
        prediction: Literal["eps", "x0", "v"] = "v",
        loss_type: Literal["l2", "l1", "huber"] = "l2",
        min_snr: float | None = None,
        time_sampling: Literal["uniform", "stratified"] = "stratified",
        conditional: bool = True,
        label_dropout: float = 0.1,
    ):
        super().__init__(
            data,
            channels=channels,
            mult=mult,
            layers=layers,
            attention=attention,
            head_dim=head_dim,
            dropout=dropout,
            groups=groups,
            timesteps=timesteps,
            schedule=schedule,
            zero_snr=zero_snr,
            prediction=prediction,
            loss_type=loss_type,
            min_snr=min_snr,
            time_sampling=time_sampling,
            conditional=conditional,
            label_dropout=label_dropout,
        )
