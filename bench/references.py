"""References of checkpoints as a user writes them; ``encoders`` says what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import ConfigError

ENTRY_POINT_GROUP = "lmim_bench.loaders"
"""Where other packages register checkpoint families."""
RANDOM = "random:"
"""Before a reference: random weights in place of its own."""


def split_reference(reference: str) -> tuple[str, dict[str, Any]]:
    """The source and the options of a reference: ``x.pth#student,heads=6`` picks ``student`` and 6 heads.

    Raises:
        ConfigError: an option has no name, or two are picks.
    """
    if "#" not in reference or Path(reference).exists():
        return reference, {}
    source, _, fragment = reference.rpartition("#")
    options: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in fragment.split(","))):
        name, equals, value = part.partition("=")
        name, value = (name, value) if equals else ("pick", name)
        if name in options:
            raise ConfigError(f"{reference}: {name!r} is given twice")
        options[name] = [v.strip() for v in value.split(":")] if name in ("mean", "std") else value
    return source, options
