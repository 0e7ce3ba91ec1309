"""`python -m gzcli.cli.site FOLDER` builds the site of the documentation in a folder, for `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

from gzcli.cli.app import build
from gzcli.docs.manual import commands


def main(words: list[str]) -> None:
    from gzcli.docs.site import build as build_site  # loads MkDocs, which is optional

    if len(words) != 1:
        raise SystemExit(__doc__)
    print(build_site(Path(words[0]), commands(build([]))))


if __name__ == "__main__":
    main(sys.argv[1:])
