"""The packages of the wheel: all that lie in `gzcli`, and the recipes beside it as `gzcli._recipes`.

`pyproject.toml` can either find packages or list them, and the recipes' folder is not found below `gzcli`.
"""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["gzcli*"]), "gzcli._recipes"])
