"""Builds the site of the documentation in a folder, for `make docs`: `python .ci/site.py FOLDER`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from gzcli.cli.app import build
from gzcli.docs import page, site

if len(sys.argv) != 2:
    raise SystemExit(__doc__)
logging.basicConfig(level=logging.WARNING)  # what ends a strict build
print(site.build(Path(sys.argv[1]), page.commands(build())))
