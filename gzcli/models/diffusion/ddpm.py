"""DDPM — Ho et al. 2020, arXiv:2006.11239."""

from __future__ import annotations

from typing import Any, Literal

from gzcli.errors import UsageError
from gzcli.models.diffusion.applications import Applications
from gzcli.models.nn import UNet
from gzcli.types import DataInfo


class DDPM(Applications):
    """The U-Net of Ho 2020, appendix B, in the process that process.py describes.

    channels × mult: width of each level, of `layers` residual blocks; attention: the resolutions, in pixels,
    that have it beside the middle, with heads of `head_dim` channels (None: one head). factor: for `--do
    upscale` by so much, see process.py; `train.init` may be a run without it. Raises UsageError for sizes
    that do not fit, and for a conditional model of data without labels.
    """

    paper = "Ho et al. 2020, arXiv:2006.11239"

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
        conditional: bool = False,
        label_dropout: float = 0.1,
        factor: int | None = None,
    ):
        net = UNet.of(
            data,
            guides=data.shape[0] if factor else 0,
            channels=channels,
            mult=mult,
            attention=attention,
            conditional=conditional,
            layers=layers,
            head_dim=head_dim,
            dropout=dropout,
            groups=groups,
        )
        super().__init__(
            data,
            net,
            timesteps=timesteps,
            schedule=schedule,
            zero_snr=zero_snr,
            prediction=prediction,
            loss_type=loss_type,
            min_snr=min_snr,
            time_sampling=time_sampling,
            conditional=conditional,
            label_dropout=label_dropout,
            factor=factor,
        )

    def to_diffusers(self) -> Any:
        """A `DDPMPipeline` of the same weights and schedule, which draws the pictures that `sample` draws by
        dpmpp on trailing steps. That of a conditional model is for its parts: the pipeline itself knows no
        labels."""
        from diffusers import DDPMPipeline

        if self.factor:
            raise UsageError("diffusers has no pipeline for a `model.factor`")
        pipeline = DDPMPipeline(
            unet=self.net.to_diffusers(self.data.shape[1:]), scheduler=self.to_scheduler()
        )
        pipeline.usage = (
            "`pipeline.unet(x, t, class_labels=y)` and `pipeline.scheduler`: the pipeline itself knows no "
            "labels"
            if self.conditional
            else "`pipeline(batch_size=16, num_inference_steps=20).images`: what gz draws with "
            "`sample.sampler=dpmpp`, "
            "`sample.spacing=trailing` and as many `sample.steps`"
        )
        return pipeline
