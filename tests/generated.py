"""How many cases tests/faults generates: `make fuzz` multiplies them by GZ_FUZZ, and draws them anew."""

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("GZ_FUZZ", "1"))


def generated(count: int) -> settings:
    how = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    return settings(max_examples=count * TIMES, derandomize=TIMES == 1, **how)
