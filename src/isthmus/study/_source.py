"""Which version of the source code is running: the commit, if the package lies in a git checkout of its own."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["source_state"]


@cache
def source_state() -> dict[str, Any] | None:
    """Return the commit and whether the tree differs from it; ``None`` outside a checkout or without git."""
    here = Path(__file__)
    if _git("ls-files", "--error-unmatch", here.name, at=here.parent) is None:
        return None
    commit = _git("rev-parse", "HEAD", at=here.parent)
    changes = _git(
        "status", "--porcelain", "--untracked-files=no", "--", str(here.parents[1]), at=here.parent
    )
    return None if commit is None else {"commit": commit.strip(), "dirty": bool((changes or "").strip())}


def _git(*arguments: str, at: Path) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=at, capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
