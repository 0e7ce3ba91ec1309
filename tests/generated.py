"""How many cases the tests of tests/faults generate: `make fuzz` sets GZ_FUZZ, by which each number is
multiplied; the cases are then others every time."""

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("GZ_FUZZ", "1"))


def generated(count: int) -> settings:
    return settings(
        max_examples=count * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
