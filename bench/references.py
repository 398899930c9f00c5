"""References of checkpoints as a user writes them; ``encoders`` says what they mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .errors import ConfigError

ENTRY_POINT_GROUP = "lmim_bench.loaders"
"""Where other packages register checkpoint families."""
TIMM, PYTHON, HUGGING_FACE, PIXELS = "timm:", "python:", "hf:", "pixels"
RANDOM = "random:"
"""Before a reference: random weights in place of its own."""
SCHEMES = (TIMM, PYTHON, HUGGING_FACE, RANDOM)
FORMS = "file, folder, timm:NAME[:pretrained], hf:FOLDER, random:REF, python:package.module:factory or pixels"


def at_home(path: str | Path) -> Path:
    """A path with its ``~`` expanded, which a shell leaves in ``--out=~/x``; one of no such user as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's own raises where there is none


def file_at_home(reference: str) -> str:
    """The reference of a checkpoint with the ``~`` of its path expanded."""
    path = reference.removeprefix(RANDOM).removeprefix(HUGGING_FACE)
    return f"{reference.removesuffix(path)}{at_home(path)}" if path.startswith("~") else reference


def is_pixels(source: str) -> bool:
    """Whether a reference asks for the pixels themselves: ``pixels`` or ``pixels:PATCH``."""
    return source == PIXELS or source.startswith(f"{PIXELS}:")


def is_path(source: str) -> bool:
    """Whether a reference is the path of a file or folder, and not of one of the other forms."""
    return Path(source).exists() or not (source.startswith(SCHEMES) or is_pixels(source))


def name_of(reference: str) -> str:
    """What a reference is called where no label is given: the name of its file, folder or model."""
    if not is_path(reference):
        if reference.startswith(RANDOM):
            return f"{name_of(reference.removeprefix(RANDOM))} (random)"
        if reference.startswith((TIMM, PYTHON)):
            return reference.partition(":")[2].replace(":pretrained", " (pretrained)")
    path, _, picked = reference.removeprefix(HUGGING_FACE).partition("#")
    name = Path(path).name if Path(path).is_dir() else Path(path).stem
    return name + (f"#{picked}" if picked else "")


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
