"""Drafts of families whose network timm has, under another name or in another size than a registered one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..timm_models import create_timm, timm_spec
from .family import Draft, Tensors


def timm_draft(
    family: str,
    name: str,
    kwargs: Mapping[str, Any],
    tensors: Tensors,
    *,
    notes: tuple[str, ...] = (),
    **fields: Any,
) -> Draft:
    """The draft of a registered timm model with arguments that the file's shapes ask for.

    Args:
        family: the spec's family.
        name: a registered model of the right kind; its preprocessing holds where ``fields`` say nothing.
        kwargs: constructor arguments, JSON only.
        tensors: the encoder's tensors in timm's names.
        notes: see ``Draft``.
        fields: fields of the spec that the family decides.

    Raises:
        CheckpointError: timm cannot build it.
    """
    model = create_timm(name, pretrained=False, **kwargs)
    arch = {"builder": "timm", "name": name, "kwargs": dict(kwargs)}
    spec = timm_spec(model, arch, family).model_copy(update=fields)
    return Draft(tensors, spec, notes, model)
