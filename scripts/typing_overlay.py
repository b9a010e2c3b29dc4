"""Lay the repository out as type checkers need to see it: build/typing/graphwright/{ir,passes,frontends,backends}.

The package is called ``graphwright`` but its folders stand at the root of the repository; an editable installation maps
them with an import hook, which mypy and pyright do not run. This makes a folder of symbolic links that they can read.
It lies under build/, which git ignores. Run by ``make lint``; running it again changes nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
OVERLAY = REPOSITORY / "build" / "typing" / "graphwright"
LINKS = {
    "ir": "ir",
    "passes": "passes",
    "frontends": "frontends",
    "backends": "backends",
    "__init__.py": "frontends/_public/__init__.py",
    "py.typed": "frontends/_public/py.typed",
}


def lay_out(overlay: Path = OVERLAY) -> None:
    """Make every link of ``LINKS`` under ``overlay``, replacing those that point elsewhere."""
    overlay.mkdir(parents=True, exist_ok=True)
    for name, source in LINKS.items():
        link = overlay / name
        target = os.path.relpath(REPOSITORY / source, overlay)
        if link.is_symlink() and os.readlink(link) == target:
            continue
        link.unlink(missing_ok=True)
        link.symlink_to(target)


if __name__ == "__main__":
    lay_out()
