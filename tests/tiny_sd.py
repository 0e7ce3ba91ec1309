"""The tiny bases of gz, saved to disk as the published ones are."""

import os
from functools import cache
from pathlib import Path

TINY = ("tiny", "tiny-xl", "tiny-sd3", "tiny-flux")


@cache
def base(name: str = "tiny", prediction: str = "epsilon") -> str:
    """The folder of a tiny base, in GZ_HOME at the first call; `prediction` is of those that are no flows."""
    from diffusers import DDIMScheduler

    from gzcli.models.stable_diffusion import tiny

    base = tiny.tiny_base(name)
    if not base.flow:
        base.pipe.scheduler = DDIMScheduler.from_config(
            base.pipe.scheduler.config, prediction_type=prediction
        )
    folder = Path(os.environ["GZ_HOME"]) / f"{name}-{prediction}-{os.getpid()}"
    base.pipe.save_pretrained(folder)
    return str(folder)
