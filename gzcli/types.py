"""Types that the model files of users import from here, and the copies of these files in runs."""

from gzcli.core.types import Batch, DataInfo, Noise, Progress, no_progress

__all__ = ["Batch", "DataInfo", "Noise", "Progress", "no_progress"]
