"""Networks that timm does not have, one file each; ``build_network`` makes them from a spec's ``arch``.

A network is a column of blocks of one width. Its file holds the frozen pydantic model of its ``arch`` (with a
``builder`` of its own) and the ``Network``; ``BUILDERS`` below names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError
from .beit import build_beit
from .capi import build_capi
from .data2vec2 import build_data2vec2
from .dinov3 import build_dinov3
from .network import Network
from .resnet import build_resnet
from .vjepa import build_vjepa
from .vjepa2 import build_vjepa2

__all__ = ["BUILDERS", "Network", "build_network"]

BUILDERS: dict[str, Callable[[Mapping[str, Any]], Network]] = {
    "beit": build_beit,
    "capi": build_capi,
    "data2vec2": build_data2vec2,
    "dinov3": build_dinov3,
    "resnet": build_resnet,
    "vjepa": build_vjepa,
    "vjepa2": build_vjepa2,
}


def build_network(arch: Mapping[str, Any]) -> Network:
    """The empty network of a spec's ``arch``. Raises CheckpointError for a builder that is not known."""
    builder = arch.get("builder")
    if builder not in BUILDERS:
        known = ", ".join(sorted(("timm", "vit", *BUILDERS)))
        raise CheckpointError(f"the spec names no builder that is known here: {builder!r} (known: {known})")
    return BUILDERS[builder](arch)
