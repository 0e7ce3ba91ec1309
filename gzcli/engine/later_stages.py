"""Later stages of a run, built in advance: a wrong option is told before an earlier stage is trained."""

from __future__ import annotations

from gzcli.core.errors import UsageError
from gzcli.core.parts import part_of
from gzcli.data.packs.open import open_pack, pack_options
from gzcli.engine.cost import Seen, build
from gzcli.engine.latent_shape import on_latents
from gzcli.engine.shapes import shapes_only
from gzcli.store.runs import Run


def check(run: Run) -> None:
    """Builds the models of all stages of a run, without values.

    Nothing is said of a stage that cannot be built in advance for another reason, nor of those after it.

    Raises UsageError of the first model whose options do not fit.
    """
    seen: dict[str, Seen] = {}
    for stage in run.stages:
        part = part_of(stage.tree())
        try:
            pack = open_pack(part.data.name, **pack_options(part.data))
            info = on_latents(part, pack.info(levels=part.data.levels, steps=part.train.steps))
            with shapes_only():
                build(part, info, seen)
        except UsageError:
            raise
        except Exception:  # a model of others may do anything with a net that has no values
            return
        seen[stage.path.name] = Seen(part, info)
