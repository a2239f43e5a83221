"""Where ANEE keeps what it measured or compiled on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $ANEE_CACHE, or anee/ in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anee"
    return Path(os.environ.get("ANEE_CACHE") or default)
