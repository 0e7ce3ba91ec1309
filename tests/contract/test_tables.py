"""A choice that an option offers is an entry of the table that carries it out, and the other way round."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from gzcli.models.denoising.flow import FlowMatching
from gzcli.models.denoising.schedule import BETAS, ScheduleName
from gzcli.models.diffusion import options as diffusion
from gzcli.models.diffusion.process import LOSSES
from gzcli.models.nn.ode import TABLEAUX, Solver
from gzcli.models.score import ncsnv2, sampling, sde, sgm


def choices(owner: typing.Any, option: str) -> tuple[str, ...]:
    """What an option of a dataclass, or of a method, may be."""
    return typing.get_args(typing.get_type_hints(owner)[option])


@pytest.mark.parametrize(
    ("offered", "table"),
    [
        (typing.get_args(diffusion.SamplerName), diffusion.SAMPLERS),
        (choices(sgm.SGMSampling, "sampler"), sampling.SAMPLERS),
        (choices(ncsnv2.NCSNSampling, "sampler"), {**sampling.SAMPLERS, "langevin": None}),
        (choices(FlowMatching.sample, "sampler"), {**TABLEAUX, "adaptive": None}),
        (typing.get_args(Solver), {**TABLEAUX, "adaptive": None}),
        (choices(sde.SDEOptions, "sde"), sde.SDES),
        (typing.get_args(ScheduleName), BETAS),
        (typing.get_args(diffusion.LossType), LOSSES),
    ],
)
def test_choices_are_the_entries_of_their_table(offered, table):
    assert sorted(offered) == sorted(table)


def test_groups_of_options_cannot_be_changed():
    groups = (diffusion.SamplingOptions, diffusion.DiffusionOptions, sgm.SGMSampling, sde.SDEOptions)
    for group in groups:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group(), dataclasses.fields(group)[0].name, None)
