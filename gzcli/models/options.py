"""Options of a model as its recipe has them, flat, and as its signature has them, in dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def grouped(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Flat options as the keywords of `function`; fields of a dataclass go into the parameter that has it.

    A parameter is such a group where its default is an instance of a dataclass, as in
    `unet: UNetOptions = UNetOptions(channels=32)`; what is not given keeps the value that it has there.
    """
    rest, keywords = dict(options), {}
    for name, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            own = {f.name: rest.pop(f.name) for f in dataclasses.fields(default) if f.name in rest}
            keywords[name] = dataclasses.replace(default, **own)
    return keywords | rest


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The parameters of `function` with their defaults, flat: in the place of a dataclass of options its
    fields. A parameter that must be given has `inspect.Parameter.empty`."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            found |= {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
        else:
            found[name] = default
    return found
