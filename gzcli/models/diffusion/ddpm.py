"""DDPM — Ho et al. 2020, arXiv:2006.11239."""

from __future__ import annotations

from typing import Any

from gzcli.core.errors import UsageError
from gzcli.core.types import DataInfo
from gzcli.models.diffusion.applications import DiffusionApplications
from gzcli.models.diffusion.options import DiffusionOptions
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn.unet import UNet
from gzcli.models.nn.unet_sizes import UNetOptions


class DDPM(DiffusionApplications):
    """The U-Net of Ho 2020, appendix B, in the diffusion process of process.py.

    Raises UsageError for sizes that do not fit, and for a conditional model of data without labels.

    factor: how many times `--do upscale` enlarges small images, on which the network is then conditioned;
      null: on none. `train.init` may be a run without it.
    """

    paper = "Ho et al. 2020, arXiv:2006.11239"
    net: UNet

    def __init__(
        self,
        data: DataInfo,
        *,
        unet: UNetOptions = UNetOptions(),
        process: DiffusionOptions = DiffusionOptions(),
        labels: ClusterOptions = ClusterOptions(),
        factor: int | None = None,
    ):
        guides = data.shape[0] if factor else 0
        net = UNet.of(data, unet, classes=labels.count(data), guides=guides)
        super().__init__(data, net, process, labels, factor=factor)

    def to_diffusers(self) -> Any:
        """A `DDPMPipeline` of the same weights and schedule, which draws the images of `sample` by dpmpp on
        trailing steps. It takes no labels; of a model of labels or clusters only its parts can be used."""
        from diffusers import DDPMPipeline

        if self.factor:
            raise UsageError("diffusers has no pipeline for a `model.factor`")
        pipeline: Any = DDPMPipeline(
            unet=self.net.to_diffusers(self.data.shape[1:]), scheduler=self.to_scheduler()
        )
        if self.labelled:
            pipeline.usage = (
                "`pipeline.unet(x, t, class_labels=y)` and `pipeline.scheduler`: the pipeline itself knows "
                "no labels"
            )
        else:
            pipeline.usage = (
                "`pipeline(batch_size=16, num_inference_steps=20).images`: what gz draws with "
                "`sample.sampler=dpmpp`, `sample.spacing=trailing` and as many `sample.steps`"
            )
        return pipeline
