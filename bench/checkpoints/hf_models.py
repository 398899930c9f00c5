"""Folders of transformers whose model no family reads: the library itself builds the network and fills it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

from ..errors import CheckpointError, first_line
from ..random_state import borrowed_state
from ..transformers_models import (
    INSTALL,
    OLDEST,
    create_transformers,
    has_transformers,
    image_model,
    model_of,
    own_size,
    pooling_option,
    takes_pooler,
    transformers_arch,
    transformers_spec,
)
from .contract import check_values, few, ignorable
from .exported import as_exported
from .family import Draft, Family, Root, Tensors, Tree
from .hf import CLASSIFIERS, RANK, SOURCE
from .hf_images import HALF, IMAGENET, prepared

_TOWERS = ("vision_model.", "model.vision_model.", "vision_tower.", "model.vision_tower.")
_DROP = {
    r"pooler\.dense\..*": "pooling for a classifier",
    r"(.*\.)?mask_token": "token of the pretext task",
    r"(.*\.)?position_ids": "buffer that counts up",
    **{rf"{name}\..*": reason for name, reason in CLASSIFIERS.items()},
}
_SIBLINGS = {
    **CLASSIFIERS,
    r"decoder|lm_head|predictor|encoder_norm|multiscale_fusion": "head of the pre-training",
    r"pooler": "pooling for a classifier",
    r"text_model|text_projection": "text tower",
    r"visual_projection|vision_projection": "projection to the space of the texts",
    r"logit_scale|logit_bias": "scale of the similarities",
}
_SIZE = 224


def family_for(tree: Tree, matching: Sequence[Family]) -> Family | None:
    """The model of transformers that config.json names, where no family for such folders reads it.

    Returns:
        None where the library does not have it, or is not here.

    Raises:
        CheckpointError: the library has the model, but config.json is none of its.
    """
    if any(family.source == SOURCE for family in matching):
        return None
    found = image_model(tree.config)
    if found is None:
        return None
    cls, config = found
    path = next(
        (
            p
            for p in (f"{cls.base_model_prefix}.", *_TOWERS)
            if any(key.startswith(p) for key in tree.tensors)
        ),
        "",
    )
    first = next(key.removeprefix(path) for key in tree.tensors if key.startswith(path))
    pooler = any(re.fullmatch(r"pooler\.(?!dense\.).*", key.removeprefix(path)) for key in tree.tensors)
    arch = transformers_arch(config, pooler or not takes_pooler(cls))
    with torch.device("meta"):
        own = set(create_transformers(arch).state_dict())

    def draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
        if heads is not None:
            raise CheckpointError(f"config.json says the number of heads; leave out heads={heads}")
        for name, tensor in tensors.items():
            check_values(name, tensor)
        filled, said = _load(arch, tensors)
        spec = as_exported(transformers_spec(filled, arch, own_size(config) or _SIZE), tree.config)
        usual = HALF if "siglip" in config.model_type else IMAGENET
        spec, note = prepared(spec, root, usual)
        built = f"built by transformers {version('transformers')} as {cls.__name__}"
        return Draft(filled.state_dict(), spec, (built, note, *said), filled)

    return Family(
        name="transformers",
        title=f"transformers' {cls.__name__}",
        rank=RANK,
        anchors=(first,),
        matches=lambda root: root.path == path,
        draft=draft,
        drop={
            pattern: why for pattern, why in _DROP.items() if not any(re.fullmatch(pattern, k) for k in own)
        },
        siblings=_SIBLINGS,
    )


def way_out() -> str:
    """What to do about a model of transformers that is not read."""
    if has_transformers():
        return ""
    return f"; if transformers {OLDEST} has it as an image model, {INSTALL} reads it"


def _load(arch: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> tuple[Any, tuple[str, ...]]:
    """The model of ``transformers_arch``, filled by the library, which knows what it calls the names on disk.

    Returns:
        The model, and notes on the tensors that its class lets a file leave out or have beyond it.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape.
    """
    cls, config = model_of(arch)
    try:
        with _quiet(), borrowed_state():
            model, report = cls.from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                output_loading_info=True,
                dtype=torch.float32,
                **pooling_option(cls, arch),
            )
    except Exception as error:
        raise CheckpointError(
            f"transformers' {cls.__name__} does not take the weights: {first_line(error)}"
        ) from error
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or unexpected:
        what = f"lacks {few(missing)}" if missing else f"has too {few(unexpected)}"
        hint = "" if missing else ignorable(unexpected, (*tensors, *model.state_dict()))
        raise CheckpointError(f"the file does not fill transformers' {cls.__name__}: it {what}{hint}")
    own = model.state_dict()
    # They are pages of the file, which may change or go away.
    model.load_state_dict({name: tensor.clone() for name, tensor in own.items()}, assign=True)
    left_out = _listed(model._keys_to_ignore_on_load_missing, own.keys() - tensors.keys())
    beyond = _listed(model._keys_to_ignore_on_load_unexpected, tensors.keys() - own.keys())
    says = f"transformers' {cls.__name__} lets its files"
    notes = (
        left_out and f"{says} leave out {few(left_out)}",
        beyond and f"{says} have beyond it {few(beyond)}",
    )
    return model, tuple(note for note in notes if note)


def _listed(patterns: Iterable[str] | None, keys: Iterable[str]) -> list[str]:
    return sorted(key for key in keys if any(re.search(pattern, key) for pattern in patterns or ()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own account of what it loaded: ours is made of what it returns."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
