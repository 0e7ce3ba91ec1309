"""Whether a data set has what a model needs: labels, two domains, captions, further pictures, or latents."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gzcli.core.errors import UsageError
from gzcli.core.parts import Part
from gzcli.data.sets.registry import EXTRAS, SPECS, extras_in_words
from gzcli.models import catalog
from gzcli.models.catalog import ModelCard


def check_batch_of(part: Part, n: int, name: str) -> None:
    """Raises UsageError where a batch has more images than there are to train on.

    n: number of training images of the set.
    name: name of the set, for messages.
    """
    n = min(n, part.data.n or n)
    if part.train.batch_size > n:
        fits = 1 << (n.bit_length() - 1)
        raise UsageError(
            f"`train.batch_size` is {part.train.batch_size}, and `{name}` has {n} images to train on",
            hint=f"`--set train.batch_size={fits}`",
        )


def check_strategy(part: Part, card: ModelCard) -> None:
    """Raises UsageError where the weights of a part's model cannot be shared out as `launch.strategy` asks.

    card: card of the part's model.
    """
    if part.launch.strategy != "fsdp":
        return
    able = ", ".join(f"`{other.name}`" for other in catalog.cards().values() if other.shares)
    if not card.shares:
        raise UsageError(
            f"`launch.strategy: fsdp` cannot share out the weights of `{card.name}`",
            hint=f"it works with {able}; `ddp` works with every model",
        )
    refused = {  # key → the value that does not work, why, and what does
        "optim.name=muon": ("needs whole matrices", "`--set optim.name=adamw`"),
        "optim.name=adamw8bit": ("keeps blocks of whole tensors", "`--set optim.name=adamw`"),
        "train.precision=fp16": ("needs a scale that all agree on", "`--set train.precision=bf16`"),
        "train.compile=True": ("compiles whole weights", "`--set train.compile=auto`"),
    }
    tree = part.tree()
    for setting, (why, instead) in refused.items():
        (section, key), value = setting.partition("=")[0].split("."), setting.partition("=")[2]
        if str(tree[section][key]) == value:
            what = f"`{section}.{key}: {value.lower()}` {why}"
            raise UsageError(f"{what}, which `launch.strategy: fsdp` has not", hint=instead)


def check_data(
    part: Part,
    card: ModelCard,
    classes: tuple[str, ...] | int,
    name: str,
    extras: Collection[str] = (),
    shape: Sequence[int] = (),
) -> None:
    """Raises UsageError where a data set lacks what a part of a recipe needs; its hint names sets that fit.

    card: card of the part's model.
    classes: names of the set's classes, or their number.
    name: name of the set, for messages.
    extras: what comes with each image of the set, as `caption`.
    shape: (C, H, W) of the images; (): not known.
    """
    if card.square and shape and shape[-1] != shape[-2]:
        raise UsageError(
            f"`{card.name}` needs square images, and those of `{name}` are {shape[-1]}×{shape[-2]}",
            hint=f"`--set data.size={min(shape[1:])}` crops them, with `--set data.fit=pad` it pads them",
        )
    wanted = [extra for extra in EXTRAS if extra in card.needs]
    if lacking := [extra for extra in wanted if extra not in extras]:
        able = ", ".join(spec.name for spec in SPECS.values() if set(wanted) <= set(spec.extras))
        hint = f"sets that have: {able or 'none is shipped'}; or a folder with a `metadata.jsonl`"
        raise UsageError(f"`{card.name}` needs {extras_in_words(lacking)}, and `{name}` has none", hint=hint)
    count = classes if isinstance(classes, int) else len(classes)
    if "second_domain" in card.needs and count != 2:
        paired = [spec.name for spec in SPECS.values() if spec.n_classes == 2]
        hint = f"sets of two classes: {', '.join(paired)}; or a folder with `trainA` and `trainB`"
        raise UsageError(
            f"`{card.name}` needs images of two domains, and `{name}` has {count or 'no'} classes", hint=hint
        )
    if part.data.latent and not card.latents:
        able = ", ".join(f"`{other.name}`" for other in catalog.cards().values() if other.latents)
        raise UsageError(
            f"`{card.name}` models grey levels, so it cannot live on latents",
            hint=f"`data.latent` works with {able}",
        )
    conditional = part.options.get("conditional") is True
    if classes or not (conditional or "labels" in card.needs):
        return
    labelled = [spec.name for spec in SPECS.values() if spec.classes]
    hint = f"sets with labels: {', '.join(labelled)}"
    if conditional and "labels" not in card.needs:
        hint += "; or `--set model.conditional=false`"
    raise UsageError(f"`{card.name}` needs labels, and `{name}` has none", hint=hint)
