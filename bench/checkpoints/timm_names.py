"""Which timm model a file is of, where something says it: what lies beside it, what it states, its name.

Names of timm tell what shapes leave open: rotary positions, norms in other places, activations, poolings,
blurred strides, and how images are prepared. A name counts where the file has the model's keys.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from timm.layers.patch_embed import PatchEmbed

from ..errors import CheckpointError, complaint
from ..timm_models import create_timm, timm_notes, timm_spec
from ..types import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec
from .exported import as_exported
from .families import clip, timm_vit
from .family import Draft, Family, Root, Tree, stated_args

# Families up to this rank know a network by its shapes alone, those above by the marks of a method.
_GENERAL = 45
_CLASSIFIERS = (r"head(_dist)?\..*", r"head\.fc\..*", r"fc\..*", r"classifier\..*", r"last_linear\..*")
_IMAGENETS = (
    "WARNING: ImageNet's mean and std are assumed, as timm's weights of this name differ in theirs; add "
    "#arch={}.TAG, or #mean=a:b:c,std=a:b:c"
)
_TIMMS = (
    "WARNING: mean and std are those of timm's own weights of this name; add #mean=a:b:c,std=a:b:c if these "
    "were trained with others"
)
_IMAGES = ("mean", "std", "crop_pct", "interpolation", "input_size", "img_size")
# Arguments of a model, and the options of timm's trainer that set them beside its model_kwargs.
_TRAINERS = {"global_pool": "gp", "bn_eps": "bn_eps"}
_IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def named_in(tree: Tree, rank: int | None, heads: int | None) -> Family | None:
    """The timm model that something names, where that says more than the families do.

    Args:
        tree: the file.
        rank: of the most specific family that reads it, or None.
        heads: asked for by the user.
    """
    beside = tree.config.get("architecture")
    if isinstance(beside, str) and timm.is_model(beside):
        family = named_family(beside, tree, config=tree.config)
        if family.roots(tree):
            return family
    tower = clip.timm_tower(tree)
    if tower is not None:
        family = named_family(tower[0], tree, adapt=tower[1])
        if family.roots(tree):
            return replace(family, siblings=clip.SIBLINGS)
    stated = tree.payload.get("arch")
    if isinstance(stated, str) and timm.is_model(stated):
        config, trained = _of_the_trainer(stated, tree)
        if not rank:
            return named_family(stated, tree, config=config, notes=trained)
        if rank <= _GENERAL and (trained or not _is_torchvisions(stated)):
            family = named_family(stated, tree, config=config, notes=trained, whole=True)
            if _is_all(family, tree):
                return family
    # A number of heads that is asked for is none of a registered model.
    name = next(_file_names(tree.stem), None) if heads is None else None
    if name is None:
        return None
    said = f"the file is called after timm's {name}, whose keys it has"
    if rank is None:
        family = named_family(name, tree, said=said)
        return family if family.roots(tree) else None
    # A name with its tag is of timm's own files. A bare one may be of a file that some method has trained.
    if "." not in name and (rank > _GENERAL or _is_torchvisions(name)):
        return None
    family = named_family(name, tree, said=said, whole=True)
    return family if _is_all(family, tree) else None


def _of_the_trainer(name: str, tree: Tree) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """What the options of timm's trainer in the file come to, as a config.json of timm, and notes on that.

    Raises:
        CheckpointError: timm cannot make anything of the options.
    """
    args = {key: value for key, value in stated_args(tree).items() if value not in (None, "")}
    if args.get("model") != name and "model_kwargs" not in args:
        return {}, ()
    kwargs = {key: args[option] for key, option in _TRAINERS.items() if option in args}
    known = timm.get_pretrained_cfg(name)
    own = asdict(known) if known else {}
    asked = {key: args[key] for key in _IMAGES if key in args}
    try:
        images = resolve_data_config(  # type: ignore[no-untyped-call]
            asked, pretrained_cfg=own or {"input_size": (3, 224, 224)}
        )
        kwargs |= args.get("model_kwargs", {})
        json.dumps(kwargs)
    except (AssertionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the options of timm's trainer in the file (args) cannot be followed: {complaint(error)}"
        ) from error
    shown = ", ".join(f"{key}={value}" for key, value in kwargs.items())
    return {"model_args": kwargs, "pretrained_cfg": images}, (
        "mean, std and crop as the options of timm's trainer in the file say",
        *((f"built with {shown}, as they say",) if shown else ()),
    )


def named_family(
    name: str,
    tree: Tree,
    *,
    config: Mapping[str, Any] | None = None,
    adapt: Callable[[EncoderSpec], tuple[EncoderSpec, str]] | None = None,
    notes: Sequence[str] = (),
    said: str = "",
    whole: bool = False,
) -> Family:
    """A family for one named timm model: its own keys are the layout, and timm knows its preprocessing.

    Args:
        name: of the model, with or without a tag.
        tree: the file, whose position table tells the size of the images.
        config: timm's config.json beside the file, or what its trainer's options come to.
        notes: for the result.
        adapt: what another configuration makes of the model's spec, and a note on that.
        said: a note on who says so: the file's name. A bare one does not say which weights they are.
        whole: a root must have all keys of the model in their shapes, and not just most of them.

    Raises:
        CheckpointError: timm has no such model.
    """
    config = config or {}
    # An encoder has no classifier, which newer versions of timm state among the arguments.
    kwargs = {key: value for key, value in (config.get("model_args") or {}).items() if key != "num_classes"}
    model, kwargs, resized = _build(name, kwargs, tree)
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    arch = {"builder": "timm", "name": name, "kwargs": kwargs}
    try:
        spec = as_exported(timm_spec(model, arch, pretrained_cfg=config.get("pretrained_cfg")), config)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the pretrained_cfg of timm's {name} beside the file cannot be followed: {complaint(error)}"
        ) from error
    notes = [f"built as timm's {name}", *notes, said, resized, *timm_notes(model)]
    if adapt is not None:
        spec, note = adapt(spec)
        notes.append(note)
    if said and "." not in name:
        # A bare name tells the network, not whose weights they are.
        if not _has_one_normalisation(name):
            spec = spec.model_copy(update=_IMAGENET)
            notes.append(_IMAGENETS.format(name))
        elif spec.mean != _IMAGENET["mean"]:
            notes.append(_TIMMS)
    drop = {
        pattern: "classifier head"
        for pattern in _CLASSIFIERS
        if not any(re.fullmatch(pattern, key) for key in expected)
    }

    def is_it(root: Root) -> bool:
        if not whole:
            # The first key may be as common as conv1.weight: a root is where most of the model is.
            return 2 * sum(key in root.tensors for key in expected) > len(expected)
        heads = [key for key in root.tensors if any(re.fullmatch(pattern, key) for pattern in drop)]
        return expected == {key: t.shape for key, t in root.tensors.items() if key not in heads}

    def draft(root: Root, tensors: Mapping[str, torch.Tensor], heads: int | None) -> Draft:
        if heads is not None:
            raise CheckpointError(f"timm's {name} has its own number of heads; leave out heads={heads}")
        return Draft(tensors, spec, tuple(filter(None, notes)), model)

    return Family(
        name="timm",
        title=f"timm's {name}",
        rank=0,
        anchors=(next(iter(expected)),),
        matches=is_it,
        draft=draft,
        prefer=timm_vit.FAMILY.prefer,
        rename=timm_vit.LAYER_SCALE if "blocks.0.ls1.gamma" in expected else (),
        drop=drop,
        siblings=timm_vit.FAMILY.siblings,
    )


def _build(name: str, kwargs: dict[str, Any], tree: Tree) -> tuple[Any, dict[str, Any], str]:
    """The model, its arguments, and a note where the file's position table is for another image size."""
    model = create_timm(name, pretrained=False, **kwargs)
    own = model.state_dict().get("pos_embed")
    table = next((t for key, t in tree.tensors.items() if key.rpartition(".")[2] == "pos_embed"), None)
    embed = getattr(model, "patch_embed", None)
    if (
        own is None
        or table is None
        or table.ndim != 3
        or type(embed) is not PatchEmbed
        or not embed.grid_size
    ):
        return model, kwargs, ""
    rows = table.shape[1] - own.shape[1] + math.prod(embed.grid_size)
    side = math.isqrt(max(rows, 0))
    if table.shape == own.shape or not side or side * side != rows or "img_size" in kwargs:
        return model, kwargs, ""
    kwargs["img_size"] = side * embed.patch_size[0]
    note = f"images of {kwargs['img_size']} pixels, the size of the position table"
    return create_timm(name, pretrained=False, **kwargs), kwargs, note


def _is_all(family: Family, tree: Tree) -> bool:
    """Whether the file holds the encoders of a family and nothing else."""
    paths = tuple(root.path for root in family.roots(tree))
    return bool(paths) and all(name.startswith(paths) for name in tree.tensors)


def _file_names(stem: str) -> Iterator[str]:
    """The names of timm that a file may be called after, the most exact first: ``name.tag``, ``name``."""
    first, _, rest = stem.partition(".")
    if timm.is_model(first):
        yield from (name for tag in _starts(rest, "-") if timm.is_model_pretrained(name := f"{first}.{tag}"))
    yield from (name for name in _starts(first, "_-") if timm.is_model(name))


def _starts(text: str, marks: str) -> Iterator[str]:
    """A text, and what is left of it without its last parts."""
    parts = re.split(f"(?=[{marks}])", text)
    return ("".join(parts[:n]) for n in range(len(parts), 0, -1))


def _has_one_normalisation(name: str) -> bool:
    """Whether all weights that timm has for a bare name agree on mean and deviation."""
    tagged = timm.list_models(f"{name}.*", pretrained=True)
    configs = map(timm.get_pretrained_cfg, tagged)
    return len({(config.mean, config.std) for config in configs if config}) < 2


def _is_torchvisions(name: str) -> bool:
    """Whether torchvision gives the name to a network of its own, which the families know."""
    import torchvision

    return name in torchvision.models.list_models()
