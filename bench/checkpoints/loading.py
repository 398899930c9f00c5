"""From a file to an encoder: which family reads it, which of its encoders is meant, what is left out."""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import iter_modules
from typing import NamedTuple

import torch

from ..building import build_model, make_encoder
from ..errors import CheckpointError, complaint, did_you_mean
from ..references import ENTRY_POINT_GROUP
from ..types import CheckpointInfo, Encoder, EncoderSpec, TrainingPoint
from . import families as built_in
from . import native
from .contract import few, fill
from .family import (
    IGNORED,
    Draft,
    Family,
    Root,
    Tensors,
    Tree,
    choose_root,
    grow_tree,
    partial_roots,
    refuse_adapters,
    rename_keys,
)
from .files import Container, open_checkpoint
from .hf_models import family_for, way_out
from .timm_names import named_family, named_in

_SHOWN = 4


@cache
def families() -> tuple[Family, ...]:
    """All families, the most specific first: every ``FAMILY`` (or tuple ``FAMILIES``) of the modules in
    ``bench/checkpoints/families``, and what other packages add by the entry point group.

    A plug-in that cannot be imported is skipped with a warning.

    Raises:
        CheckpointError: two families have one name, or an entry point is no family.
    """
    found: list[Family] = []
    for info in iter_modules(built_in.__path__):
        module = import_module(f"{built_in.__name__}.{info.name}")
        found += getattr(module, "FAMILIES", ()) or (module.FAMILY,)
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            family = entry.load()
        except Exception as error:  # noqa: BLE001 - a broken plug-in is named, the others still serve
            warnings.warn(f"the loader {entry.name!r} ({entry.value}) is skipped: {error}", stacklevel=2)
            continue
        if not isinstance(family, Family):
            raise CheckpointError(f"the loader {entry.name!r} ({entry.value}) is not a checkpoint family")
        found.append(family)
    names = [family.name for family in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CheckpointError(
            f"two checkpoint families are called {twice[0]!r}; uninstall one of the packages"
        )
    return tuple(sorted(found, key=lambda family: -family.rank))


def load_file(
    path: str | Path,
    *,
    pick: str | None = None,
    heads: int | str | None = None,
    arch: str | None = None,
    family: str | None = None,
    ignore: str | None = None,
) -> Encoder:
    """Load the encoder of a checkpoint file.

    Args:
        path: the file.
        pick: which encoder, where the file holds several (``student``), by a component of its path.
        heads: the number of attention heads, where the file does not say it.
        arch: the timm model to build, where the layout is timm's but the shapes do not tell the model.
        family: read the file as this family, whatever others match.
        ignore: what beside the encoder is no part of it, by its path or the last component; several with
            colons between them.

    Raises:
        CheckpointError: the file cannot be read safely, is of no known layout, or breaks the contract.
    """
    try:
        container = open_checkpoint(path)
        choice = _Choice(pick, _as_heads(heads), arch, family, tuple((ignore or "").split(":")))
        with _told("an encoder"):
            root, draft, dropped, notes = _understand(container, choice)
            return _assemble(container, root, draft, dropped, notes)
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if str(path) in text else f"{path}: {text}") from error


def _as_heads(heads: int | str | None) -> int | None:
    if heads is None or isinstance(heads, int):
        return heads
    if not heads.isdigit():
        raise CheckpointError(f"heads must be a whole number, got {heads!r}")
    return int(heads)


class _Watched(dict[str, torch.Tensor]):
    """The tensors of an encoder, and which of them was asked for last."""

    last = ""

    def __getitem__(self, name: str) -> torch.Tensor:
        self.last = name
        return super().__getitem__(name)

    def seen(self) -> str:
        return f"{self.last} {tuple(self[self.last].shape)}"


@contextmanager
def _told(what: str, tensors: _Watched | None = None) -> Iterator[None]:
    """Make a refusal of what goes wrong where tensors or options are not what their names promise."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"the file has no {error.args[0]}, which {what} needs") from error
    except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        seen = (
            f"; the tensor looked at last is {tensors.seen()}" if tensors and tensors.last in tensors else ""
        )
        raise CheckpointError(
            f"the file does not make {what}: {complaint(error)} ({type(error).__name__}){seen}"
        ) from error


Understood = tuple[str, Draft, dict[str, str], tuple[str, ...]]


class _Choice(NamedTuple):
    """What the user says of a file; see ``load_file``."""

    pick: str | None
    heads: int | None
    arch: str | None
    family: str | None
    ignored: tuple[str, ...]


def _understand(container: Container, choice: _Choice) -> Understood:
    """Which encoder of the file, in which names, built how; what is dropped, and what to note."""
    if native.is_native(container.payload):
        if any(filter(None, (*choice[:-1], *choice.ignored))):
            raise CheckpointError("a checkpoint of lmim-bench says all by itself; it takes no such option")
        return "encoder", native.read(container.payload), {}, ()
    path = container.path
    folder = path if path.is_dir() else path.parent
    tree = grow_tree(container.payload, container.config, path.stem, folder)
    if not tree.tensors:
        raise CheckpointError("the file holds no weights")
    if choice.arch is not None:
        return _by_family(named_family(choice.arch, tree), tree, choice)
    if choice.family is not None:
        known = {f.name: f for f in families()}
        if choice.family not in known:
            hint = did_you_mean(choice.family, known)
            raise CheckpointError(f"there is no checkpoint family {choice.family!r}. {hint}")
        return _by_family(known[choice.family], tree, choice)
    matching = [f for f in families() if f.roots(tree)]
    named = named_in(tree, matching[0].rank if matching else None, choice.heads) or family_for(tree, matching)
    if named is not None:
        return _by_family(named, tree, choice)
    if not matching:
        raise CheckpointError(_unknown(tree))
    best = [f for f in matching if f.rank == matching[0].rank]
    if len(best) > 1:
        names = ", ".join(f.name for f in best)
        raise CheckpointError(f"the layout could be any of {names}; choose with #family={best[0].name}")
    return _by_family(best[0], tree, choice)


def _by_family(family: Family, tree: Tree, choice: _Choice) -> Understood:
    roots = family.roots(tree)
    if not roots:
        raise CheckpointError(
            f"the file holds no encoder in the layout of {family.title}; it holds {_outline(tree)}"
        )
    root, of_several = choose_root(family, roots, choice.pick)
    tensors, dropped = rename_keys(family, root, choice.ignored)
    if choice.pick is None:
        _refuse_shallow(family, root, tensors, roots)
    unknown = []
    # Who picks one encoder passes over what is no whole one; else it is unknown and shall be seen.
    known = (*roots, *partial_roots(roots)) if choice.pick is not None else roots
    others = tuple(other.path for other in known if other.path != root.path)
    for branch in root.siblings():
        last = branch.rpartition(".")[2]
        reason = next((r for pattern, r in family.siblings.items() if re.fullmatch(pattern, last)), None)
        if branch in choice.ignored or last in choice.ignored:
            reason = IGNORED
        if reason is None and any(other.startswith(branch + ".") for other in others):
            reason = "another encoder of the file"
        if reason is None:
            unknown.append(branch)
        else:
            dropped[branch if branch in tree.tensors else f"{branch}.*"] = reason
    if unknown:
        raise CheckpointError(
            f"beside the encoder {root.title!r} the file holds tensors that the layout {family.name} does "
            f"not know: {few(unknown)}; if they are no part of the encoder, add "
            f"#ignore={':'.join(branch.rpartition('.')[2] for branch in unknown[:4])}"
        )
    dropped |= tree.skipped
    if all(tensor.ndim < 2 for tensor in tensors.values()):
        raise CheckpointError(
            "all tensors are flat, as the parts that FSDP keeps; save a full state dict where it was trained"
        )
    watched = _Watched(tensors)
    with _told(f"the layout {family.name}", watched):
        draft = family.draft(root, watched, choice.heads)
    return root.title, draft, dropped, (of_several,) if of_several else ()


def _refuse_shallow(family: Family, root: Root, tensors: Tensors, roots: Sequence[Root]) -> None:
    """Refuse the encoder by default where another one of the file has more blocks: it lost its last ones."""
    own = _numbered(tensors)
    for other in roots:
        if other.path == root.path:
            continue
        further = sorted(
            name
            for name in _numbered(rename_keys(family, other)[0]) - own
            if re.sub(r"\d+$", "0", name) in own
        )
        if further:
            raise CheckpointError(
                f"the encoder {root.title!r} has no {further[0]}, which {other.title!r} has; to score it all "
                f"the same, add #{root.title}"
            )


def _numbered(tensors: Tensors) -> set[str]:
    """The paths of the modules that are counted: ``blocks.11``, ``stages.3.blocks.1``."""
    return {name[: found.start()] for name in tensors for found in re.finditer(r"(?<=\d)\.", name)}


def _unknown(tree: Tree) -> str:
    """What the file holds, and what could be meant."""
    kind = tree.config.get("model_type")
    if isinstance(kind, str):
        text = (
            f"{kind!r} of transformers (model_type in config.json) is not read; it holds {_outline(tree)}"
            f"{way_out()}"
        )
    else:
        refuse_adapters(tree.tensors)
        text = f"the layout is not known; it holds {_outline(tree)}{_closest(tree)}"
    return (
        f"{text}; `lmim-bench formats` lists what is read. If timm has this network, name it by #arch=NAME; "
        "any other loads through python:package.module:factory"
    )


def _closest(tree: Tree) -> str:
    """The family that has most keys of the file, and what it has beyond them, or nothing."""
    near = [(family.nearest(tree), family) for family in families()]
    (hits, path, absent), family = max(near, key=lambda entry: (entry[0][0], -len(entry[0][2])))
    if not hits:
        return ""
    if not absent:
        return f"; closest is {family.name}, of which it has the keys but not what else tells it apart"
    where = f" below {path.rstrip('.')!r}" if path else ""
    return f"; closest is {family.name}, which also has {few(absent)}{where}"


def _outline(tree: Tree) -> str:
    """Where the keys of the file part, with the first tensor of each part, for an error message."""
    names = [name.split(".") for name in tree.tensors]
    common = next((i for i, parts in enumerate(zip(*names, strict=False)) if len(set(parts)) > 1), 0)
    groups: dict[str, list[str]] = {}
    for name, tensor in tree.tensors.items():
        groups.setdefault(name.split(".")[common], []).append(f"{name} {tuple(tensor.shape)}")
    shown = [
        first + (f" and {len(rest)} more below {group}" if rest else "")
        for group, (first, *rest) in groups.items()
    ]
    more = f" and {len(shown) - _SHOWN} more groups" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more


def _training_point(container: Container, root: str, spec: EncoderSpec) -> TrainingPoint | None:
    """The epoch that a trainer wrote beside its weights. Files of one folder that hold the same encoder are
    taken for checkpoints of one training.
    """
    epoch = container.payload.get("epoch")
    if isinstance(epoch, bool) or not isinstance(epoch, (int, float)) or not math.isfinite(epoch):
        return None
    folder = container.path.resolve().parent
    run = json.dumps([str(folder), root, spec.family, spec.arch], sort_keys=True, default=str)
    return TrainingPoint(run=hashlib.sha256(run.encode()).hexdigest()[:16], epoch=epoch)


def _assemble(
    container: Container, root: str, draft: Draft, dropped: Mapping[str, str], notes: Sequence[str]
) -> Encoder:
    spec = draft.spec
    ours = native.is_native(container.payload)
    layout = native.FORMAT if ours else spec.family
    model, fill_notes = fill(draft.model or build_model(spec), draft.tensors, spec.family)
    count = len(model.state_dict())
    info = CheckpointInfo(
        source=str(container.path),
        sha256=container.sha256,
        format=f"{layout} ({container.format})",
        container=root,
        parameters=sum(p.numel() for p in model.parameters()),
        loaded_tensors=count,  # none of them is left out, or the file was refused
        encoder_tensors=count,
        dropped=dict(dropped),
        notes=(*notes, *draft.notes, *fill_notes, *container.notes),
        random_weights=ours and native.is_untrained(container.payload),
        training=native.training_point(container.payload) if ours else _training_point(container, root, spec),
    )
    return make_encoder(model, spec, info)
