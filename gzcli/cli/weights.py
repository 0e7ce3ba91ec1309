"""Weights of published networks that a verb was asked to use."""

from __future__ import annotations

from collections.abc import Iterable

from gzcli.cli import out


def bring(names: Iterable[str]) -> None:
    """Fetches the weights that are not in the cache, with a progress bar. Raises MissingError.

    names: of `gzcli.data.download.weights.KNOWN`.
    """
    from gzcli.data.download.weights import fetch_weights

    for name in names:
        with out.progress(name) as report:
            fetch_weights(name, progress=report, say=out.info)
