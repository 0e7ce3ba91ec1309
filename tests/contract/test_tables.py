"""A choice that an option offers is an entry of the table that carries it out, and the other way round."""

import dataclasses
import typing

import pytest

from gzcli.models.denoising.process import BETAS, ScheduleName
from gzcli.models.denoising.samplers import TABLEAUX, Solver
from gzcli.models.diffusion import ddpm
from gzcli.models.flow_matching import fm
from gzcli.models.score import ncsnv2, sgm


def choices(owner: typing.Any, option: str) -> tuple[str, ...]:
    """What an option of a dataclass, or of a method, may be."""
    return typing.get_args(typing.get_type_hints(owner)[option])


def test_choices_are_the_entries_of_their_table():
    solvers = {*TABLEAUX, "adaptive"}
    for offered, table in (
        (typing.get_args(ddpm.SamplerName), ddpm.SAMPLERS),
        (choices(sgm.SamplingOptions, "sampler"), {*sgm.SAMPLERS, "ode"}),
        (choices(ncsnv2.NCSNSampling, "sampler"), {*sgm.SAMPLERS, "ode", "langevin"}),
        (choices(fm.SamplingOptions, "sampler"), solvers),
        (typing.get_args(Solver), solvers),
        (choices(sgm.SDEOptions, "sde"), sgm.SDES),
        (typing.get_args(ScheduleName), BETAS),
        (typing.get_args(ddpm.LossType), ddpm.LOSSES),
    ):
        assert sorted(offered) == sorted(table)
    groups = (ddpm.SamplingOptions, ddpm.DiffusionOptions, sgm.SamplingOptions, sgm.SDEOptions)
    for group in groups:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group(), dataclasses.fields(group)[0].name, None)
