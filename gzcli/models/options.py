"""Options between the two forms that they have: flat in a recipe, in dataclasses in a signature."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def grouped(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Flat options as keywords of `function`: those that are fields of a dataclass are grouped in it.

    A parameter is a group where its default is an instance of a dataclass, as in
    `unet: UNetOptions = UNetOptions(channels=32)`. Fields without an option keep the value of that default.
    """
    rest, keywords = dict(options), {}
    for name, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        if _is_group(default):
            fields = {f.name: rest.pop(f.name) for f in dataclasses.fields(default) if f.name in rest}
            keywords[name] = dataclasses.replace(default, **fields)
    return keywords | rest


def _is_group(default: Any) -> bool:
    """Whether a parameter with this default is a group of options."""
    return dataclasses.is_dataclass(default) and not isinstance(default, type)


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The parameters of `function` with their defaults, flat: a dataclass of options is replaced by its
    fields. The default of a required parameter is `inspect.Parameter.empty`."""
    values: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        if _is_group(default):
            values |= {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
        else:
            values[name] = default
    return values
