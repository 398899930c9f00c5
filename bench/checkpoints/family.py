"""What a family of checkpoints declares, and how the file is searched for it.

A file is a tree of dicts whose leaves are tensors. Its tensors get dotted names with the wrappers of the
trainers taken out, and every family then names a few keys (``anchors``) that its encoder has: wherever a
path ends in all of them, that path is a *root*, a candidate encoder. A family is one declaration; adding
one is adding one file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..errors import CheckpointError
from ..types import EncoderSpec

Tensors = Mapping[str, torch.Tensor]

# Components that torch's wrappers put between module names; no encoder has a module so called.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}

_TRAINING_NAMES = """
    optimizer optimizers optimizer_state optimizer_states opt scaler fp16_scaler loss_scaler lr_scheduler
    lr_schedulers scheduler dino_loss loss criterion loops callbacks rng_state amp args cfg config metric
    epoch hyper_parameters
    rng_states torch_rng_state cuda_rng_state cuda_rng_states cpu_rng_state numpy_rng_state random_rng_state
    random_states
"""
# Numbers that wrappers of a module keep beside its tensors: of torch's AveragedModel.
_COUNTERS = {"n_averaged"}
_ADAPTER = re.compile(r"(?:^|\.)(?:base_layer|lora_\w+)(?:\.|$)")
IGNORED = "ignored, as asked"
TRAINING_STATE = dict.fromkeys(_TRAINING_NAMES.split(), "training state")


@dataclass(frozen=True)
class Tree:
    """The tensors of a file under dotted names, and what else is known of the file."""

    tensors: Tensors
    skipped: Mapping[str, str]
    """Parts that were not looked into, with the reason."""
    payload: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    stem: str = ""
    folder: Path | None = None
    """Where the file lies, for what its library keeps beside it."""


@dataclass(frozen=True)
class Root:
    """One candidate encoder of a file: the tensors below a path."""

    path: str
    """Dotted path, with a dot at its end, or nothing for the top of the file."""
    tensors: Tensors
    tree: Tree

    @property
    def parts(self) -> tuple[str, ...]:
        """The components of the path."""
        return tuple(part for part in self.path.split(".") if part)

    @property
    def title(self) -> str:
        """The path as shown to a reader."""
        return self.path.rstrip(".") or "top of the file"

    def siblings(self) -> Iterator[str]:
        """Where the file's other tensors leave the path of this root: ``teacher.head``, ``student``."""
        seen: set[str] = set()
        parts = self.parts
        for name in self.tree.tensors:
            if name.startswith(self.path):
                continue
            other = name.split(".")
            same = next(i for i, part in enumerate(other) if i >= len(parts) or part != parts[i])
            branch = ".".join(other[: same + 1])
            if branch not in seen:
                seen.add(branch)
                yield branch


@dataclass(frozen=True)
class Draft:
    """What a family makes of a root: the encoder's tensors in the target's names, and how to build it."""

    tensors: Tensors
    spec: EncoderSpec
    notes: tuple[str, ...] = ()
    model: Any = None
    """The empty model, where drafting had to build it; else it is built from the spec."""


@dataclass(frozen=True)
class Family:
    """A layout of checkpoints.

    Attributes:
        name: shown to the user, and the spec's ``family``.
        title: one line for the catalogue.
        rank: specific layouts are tried before general ones; the highest rank that matches wins.
        anchors: keys, relative to the root, that the encoder must have; a tuple names alternatives.
        matches: a further condition on a root whose anchors are all there.
        prefer: path components in order of preference where a file holds several encoders.
        rename: (pattern, replacement) pairs; the first that matches a whole key is applied.
        drop: patterns of keys below the root that are not the encoder's, with the reason.
        siblings: patterns of components beside the root that are not the encoder's, with the reason.
        draft: from the root, its renamed tensors and the number of heads asked for, to the draft.
        known_by: the signature in words, for the catalogue.
        evaluated: pooling, norm and preprocessing of the family's own evaluation in words.
        source: the repository or package whose files these are.
    """

    name: str
    title: str
    rank: int
    anchors: tuple[str | tuple[str, ...], ...]
    draft: Callable[[Root, Tensors, int | None], Draft]
    matches: Callable[[Root], bool] = lambda root: True
    prefer: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    drop: Mapping[str, str] = field(default_factory=dict)
    siblings: Mapping[str, str] = field(default_factory=dict)
    known_by: str = ""
    evaluated: str = ""
    source: str = ""

    def roots(self, tree: Tree) -> list[Root]:
        """Every place in the file that looks like an encoder of this family."""
        found = []
        for path in dict.fromkeys(self._paths(tree, self.anchors[0])):
            if not self.absent(tree, path):
                below = {k.removeprefix(path): t for k, t in tree.tensors.items() if k.startswith(path)}
                root = Root(path, below, tree)
                if self.matches(root):
                    found.append(root)
        return found

    def absent(self, tree: Tree, path: str) -> list[str]:
        """The anchors that the file does not have below a path."""
        return [_names(a)[0] for a in self.anchors if not any(path + n in tree.tensors for n in _names(a))]

    def nearest(self, tree: Tree) -> tuple[int, str, list[str]]:
        """How many anchors the best place of the file has, that place, and the anchors it lacks."""
        paths = dict.fromkeys(path for anchor in self.anchors for path in self._paths(tree, anchor))
        lacking = [(path, self.absent(tree, path)) for path in paths] or [("", self.absent(tree, ""))]
        path, absent = min(lacking, key=lambda entry: (len(entry[1]), len(entry[0])))
        return len(self.anchors) - len(absent), path, absent

    @staticmethod
    def _paths(tree: Tree, anchor: str | tuple[str, ...]) -> Iterator[str]:
        for name in tree.tensors:
            for ending in _names(anchor):
                if name == ending or name.endswith("." + ending):
                    yield name.removesuffix(ending)


def stated_args(tree: Tree) -> Mapping[str, Any]:
    """The arguments of the training that the file keeps (``args``), as data: a namespace or a dict."""
    args = tree.payload.get("args")
    args = getattr(args, "state", args)
    return args if isinstance(args, Mapping) else {}


def _names(anchor: str | tuple[str, ...]) -> tuple[str, ...]:
    return (anchor,) if isinstance(anchor, str) else anchor


def grow_tree(
    payload: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    stem: str = "",
    folder: Path | None = None,
) -> Tree:
    """Flatten a file's content. Raises CheckpointError for two tensors of one name, or of another class."""
    tensors: dict[str, torch.Tensor] = {}
    skipped: dict[str, str] = {}
    wrapped = any(
        isinstance(value, Mapping) and key not in TRAINING_STATE and _holds_tensor(value)
        for key, value in payload.items()
    )

    def visit(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, torch.Tensor):
            beside = wrapped and len(path) == 1 and "." not in path[0]
            if node.numel() == 1 and (beside or path[-1] in _COUNTERS):
                # Beside state dicts, as the best accuracy so far or the step: no weight.
                skipped[".".join(path)] = "number of the training"
                return
            if type(node) not in (torch.Tensor, torch.nn.Parameter):
                raise CheckpointError(
                    f"{'.'.join(path)} is a {type(node).__name__}, not a plain tensor; save a full "
                    "state dict (of DTensor: full_tensor()) where it was trained"
                )
            parts = [part for part in ".".join(path).split(".") if part not in _WRAPPERS]
            name = ".".join(parts)
            if name in tensors:
                raise CheckpointError(f"two tensors of the file have one name, {name!r}; it cannot be read")
            tensors[name] = node
        elif isinstance(node, Mapping):
            for key, value in node.items():
                if not path and str(key) in TRAINING_STATE:
                    if _holds_tensor(value):
                        skipped[f"{key}.*"] = TRAINING_STATE[str(key)]
                else:
                    visit(value, (*path, str(key)))
        elif isinstance(node, list | tuple):
            for i, value in enumerate(node):
                visit(value, (*path, str(i)))

    visit(payload, ())
    return Tree(tensors, skipped, payload, config or {}, stem, folder)


def _holds_tensor(node: Any) -> bool:
    if isinstance(node, torch.Tensor):
        return True
    if isinstance(node, Mapping):
        return any(map(_holds_tensor, node.values()))
    return isinstance(node, list | tuple) and any(map(_holds_tensor, node))


def choose_root(family: Family, roots: Sequence[Root], pick: str | None) -> tuple[Root, str | None]:
    """The encoder to load, and a note where there was a choice.

    Raises:
        CheckpointError: the picked encoder is not there, the one that the family prefers is not complete, or
            the choice is open.
    """
    titles = ", ".join(root.title for root in roots)
    if pick is not None:
        chosen = _called(roots, pick)
        if len(chosen) != 1:
            state = "has no encoder" if not chosen else "has several encoders"
            raise CheckpointError(f"the file {state} {pick!r}; it holds: {titles}")
        return chosen[0], f"encoder {chosen[0].title!r}, as asked, of: {titles}" if len(roots) > 1 else None
    partial = partial_roots(roots)
    for part in family.prefer:
        called = _called((*roots, *partial), part)
        chosen = [root for root in called if root in roots]
        if called and not chosen:
            _refuse_partial(called[0], roots[0])
        if len(chosen) == 1:
            note = f"encoder {chosen[0].title!r}, the default of {family.name}, of: {titles}"
            return chosen[0], note if len(roots) > 1 else None
    if len(roots) == 1:
        return roots[0], None
    raise CheckpointError(
        f"the file holds several encoders ({titles}); choose one, such as #{roots[0].title}"
    )


def partial_roots(roots: Sequence[Root]) -> list[Root]:
    """Places beside the encoders of a file that have most tensors of one: encoders that are not complete."""
    tree, names = roots[0].tree, roots[0].tensors.keys()
    taken = tuple(root.path for root in roots)
    hits: Counter[str] = Counter()
    for key in tree.tensors:
        if key.startswith(taken):
            continue
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in names:
                hits["".join(f"{part}." for part in parts[:i])] += 1
    return [
        Root(path, {k.removeprefix(path): t for k, t in tree.tensors.items() if k.startswith(path)}, tree)
        for path, count in hits.items()
        if 2 * count > len(names)
    ]


def _refuse_partial(partial: Root, whole: Root) -> NoReturn:
    lacking = [name for name in whole.tensors if name not in partial.tensors]
    shown = ", ".join(lacking[:3]) + (f", ... {len(lacking)} in all" if len(lacking) > 3 else "")
    what = f"lacks {shown}, which {whole.title!r} has" if lacking else "is not whole in this layout"
    way = next((part for part in whole.parts if part not in partial.parts), whole.title)
    raise CheckpointError(f"the encoder {partial.title!r} {what}; to score the other, add #{way}")


def _called(roots: Sequence[Root], name: str) -> list[Root]:
    """The roots of a name: by their whole path, or else by a component of it."""
    return [root for root in roots if root.path.rstrip(".") == name] or [
        root for root in roots if name in root.parts
    ]


def rename_keys(
    family: Family, root: Root, ignored: Collection[str] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Drop and rename the keys below a root; returns the tensors and what was dropped, with the reasons.

    Args:
        family: the layout.
        root: the encoder, as it stands in the file.
        ignored: first components of keys that the user says to be none of the encoder's.

    Raises:
        CheckpointError: two keys get one name, the layout is known by what shall be ignored, or the encoder
            has an adapter.
    """
    for anchor in family.anchors:
        if (first := _names(anchor)[0].partition(".")[0]) in ignored:
            raise CheckpointError(f"{first!r} is the encoder itself and cannot be ignored")
    kept: dict[str, torch.Tensor] = {}
    left_out: dict[str, str] = {}
    branches: set[str] = set()
    for name, tensor in root.tensors.items():
        reason = next((r for pattern, r in family.drop.items() if re.fullmatch(pattern, name)), None)
        if name.partition(".")[0] in ignored:
            reason = IGNORED
        if reason is not None:
            left_out[name] = reason
            continue
        branches.add(name.partition(".")[0])
        for pattern, replacement in family.rename:
            if re.fullmatch(pattern, name):
                name = re.sub(pattern, replacement, name)
                break
        if name in kept:
            raise CheckpointError(
                f"two keys of the file stand for {name!r}; it cannot be read as {family.name}"
            )
        kept[name] = tensor
    refuse_adapters(kept)
    return kept, {root.path + _outlined(name, branches): reason for name, reason in left_out.items()}


def _outlined(name: str, kept: set[str]) -> str:
    """A dropped key as it is listed: its branch, or where that is kept in part, its name without numbers."""
    first, dot, _ = name.partition(".")
    if dot and first not in kept:
        return f"{first}.*"
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def refuse_adapters(names: Iterable[str]) -> None:
    """Raise CheckpointError where weights are kept apart from what an adapter adds to them."""
    found = next((name for name in names if _ADAPTER.search(name)), None)
    if found is not None:
        raise CheckpointError(
            f"the file keeps an adapter beside the weights ({found}); merge the adapter first (PEFT: "
            "merge_and_unload) and save the result"
        )


def refuse_heads(heads: int | None) -> None:
    """Raise CheckpointError where a convolutional network is given attention heads."""
    if heads is not None:
        raise CheckpointError(f"a convolutional network has no heads; leave out heads={heads}")
