"""Networks that timm does not have, one file each; ``build_network`` makes them from a spec's ``arch``.

A network is a column of transformer blocks of one width. Its file holds the frozen pydantic model of its
``arch`` (with a ``builder`` of its own) and the ``Network``; ``BUILDERS`` below names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError
from .capi import build_capi
from .network import Network
from .vjepa2 import build_vjepa2

__all__ = ["BUILDERS", "Network", "build_network"]

BUILDERS: dict[str, Callable[[Mapping[str, Any]], Network]] = {
    "capi": build_capi,
    "vjepa2": build_vjepa2,
}


def build_network(arch: Mapping[str, Any]) -> Network:
    """The empty network of a spec's ``arch``. Raises CheckpointError for a builder that is not known."""
    builder = arch.get("builder")
    if builder not in BUILDERS:
        known = ", ".join(sorted(("timm", "vit", *BUILDERS)))
        raise CheckpointError(f"the spec names no builder that is known here: {builder!r} (known: {known})")
    return BUILDERS[builder](arch)
