"""From a file to an encoder under the contract of coverage.

Every parameter and persistent buffer of the encoder is filled exactly once from the file, with its own
shape and finite values; every tensor of the file is used or dropped for a stated reason. Anything else is a
CheckpointError that names the keys: there is no loading with ``strict=False`` here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from ..backbones import create_timm, timm_encoder, timm_spec
from ..errors import CheckpointError, did_you_mean
from ..types import CheckpointInfo, Encoder, EncoderSpec
from ..vit import ViTEncoder, build_vit
from . import dino, latent_mim, mae, native, timm_vit
from .family import Draft, Family, Root, Tree, choose_root, grow_tree, rename_keys
from .files import Container, open_checkpoint, storage_is_honest

ENTRY_POINT_GROUP = "lmim_bench.loaders"
_SHOWN = 4
_CLASSIFIERS = (r"head(_dist)?\..*", r"head\.fc\..*", r"fc\..*", r"classifier\..*", r"last_linear\..*")


@cache
def families() -> tuple[Family, ...]:
    """All families, the most specific first; other packages add theirs by the entry point group.

    Raises:
        CheckpointError: two families have one name, or an entry point is no family.
    """
    found = [module.FAMILY for module in (latent_mim, mae, dino, timm_vit)]
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        family = entry.load()
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
) -> Encoder:
    """Load the encoder of a checkpoint file.

    Args:
        path: the file.
        pick: which encoder, where the file holds several (``student``), by a component of its path.
        heads: the number of attention heads, where the file does not say it.
        arch: the timm model to build, where the layout is timm's but the shapes do not tell the model.
        family: read the file as this family, whatever others match.

    Raises:
        CheckpointError: the file cannot be read safely, is of no known layout, or breaks the contract.
    """
    try:
        container = open_checkpoint(path)
        root, draft, dropped, notes = _understand(container, pick, _as_heads(heads), arch, family)
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


Understood = tuple[str, Draft, dict[str, str], tuple[str, ...]]


def _understand(
    container: Container, pick: str | None, heads: int | None, arch: str | None, family: str | None
) -> Understood:
    """Which encoder of the file, in which names, built how; what is dropped, and what to note."""
    if native.is_native(container.payload):
        if pick or heads or arch or family:
            raise CheckpointError("a checkpoint of lmim-bench says all by itself; it takes no such option")
        return "encoder", native.read(container.payload), {}, ()
    tree = grow_tree(container.payload, container.config, container.path.stem)
    if not tree.tensors:
        raise CheckpointError("the file holds no weights")
    if arch is not None:
        return _by_family(_named_family(tree, arch, {}), tree, pick, heads)
    if family is not None:
        known = {f.name: f for f in families()}
        if family not in known:
            raise CheckpointError(f"there is no checkpoint family {family!r}. {did_you_mean(family, known)}")
        return _by_family(known[family], tree, pick, heads)
    matching = [f for f in families() if f.roots(tree)]
    if not matching or matching[0].rank == 0:
        stated = _stated_arch(tree)
        if stated is not None:
            return _by_family(_named_family(tree, *stated), tree, pick, heads)
    if not matching:
        raise CheckpointError(f"the layout is not known; it holds {_outline(tree)} (docs/checkpoints.md)")
    best = [f for f in matching if f.rank == matching[0].rank]
    if len(best) > 1:
        names = ", ".join(f.name for f in best)
        raise CheckpointError(f"the layout could be any of {names}; choose with #family={best[0].name}")
    return _by_family(best[0], tree, pick, heads)


def _by_family(family: Family, tree: Tree, pick: str | None, heads: int | None) -> Understood:
    roots = family.roots(tree)
    if not roots:
        raise CheckpointError(
            f"the file holds no encoder in the layout of {family.name}; it holds {_outline(tree)}"
        )
    root, choice = choose_root(family, roots, pick)
    tensors, dropped = rename_keys(family, root)
    unknown = []
    for branch in root.siblings():
        last = branch.rpartition(".")[2]
        reason = family.siblings.get(last)
        if reason is None:
            unknown.append(branch)
        else:
            dropped[f"{branch}.*"] = reason
    if unknown:
        raise CheckpointError(
            f"beside the encoder {root.title!r} the file holds tensors that the layout {family.name} does "
            f"not know: {_few(unknown)}; load the encoder's own state dict, or choose another #family"
        )
    dropped |= {f"{name}.*": reason for name, reason in tree.skipped.items()}
    draft = family.draft(root, tensors, heads)
    return root.title, draft, dropped, (choice,) if choice else ()


def _stated_arch(tree: Tree) -> tuple[str, Mapping[str, Any]] | None:
    """The timm model that the file, or timm's config.json beside it, names."""
    import timm

    stated = tree.config.get("architecture")
    if isinstance(stated, str) and timm.is_model(stated):
        return stated, tree.config
    stated = tree.payload.get("arch")
    if isinstance(stated, str) and timm.is_model(stated):
        return stated, {}
    return None


def _named_family(tree: Tree, arch: str, config: Mapping[str, Any]) -> Family:
    """A family for one named timm model: its own keys are the layout, and timm knows its preprocessing."""
    kwargs = dict(config.get("model_args") or {})
    model = create_timm(arch, pretrained=False, **kwargs)
    expected = model.state_dict()
    spec = timm_spec(
        model,
        {"builder": "timm", "name": arch, "kwargs": kwargs},
        pretrained_cfg=config.get("pretrained_cfg"),
    )

    def draft(root: Root, tensors: Mapping[str, torch.Tensor], heads: int | None) -> Draft:
        if heads is not None:
            raise CheckpointError(f"timm's {arch} has its own number of heads; leave out heads={heads}")
        return Draft(tensors, spec, (f"built as timm's {arch}",), model)

    return Family(
        name="timm",
        title=arch,
        rank=0,
        anchors=(next(iter(expected)),),
        draft=draft,
        prefer=timm_vit.FAMILY.prefer,
        drop={
            pattern: "classifier head"
            for pattern in _CLASSIFIERS
            if not any(re.fullmatch(pattern, name) for name in expected)
        },
        siblings=timm_vit.FAMILY.siblings,
    )


def _outline(tree: Tree) -> str:
    """The first components of the file's keys and a tensor of each, for an error message."""
    heads: dict[str, str] = {}
    for name, tensor in tree.tensors.items():
        heads.setdefault(name.split(".")[0], f"{name} {tuple(tensor.shape)}")
    more = f" and {len(heads) - _SHOWN} more groups" if len(heads) > _SHOWN else ""
    return ", ".join(list(heads.values())[:_SHOWN]) + more


def _few(names: Sequence[str]) -> str:
    more = f", ... {len(names)} in all" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


# ------------------------------------------------------------------------------------------- the contract


def _assemble(
    container: Container, root: str, draft: Draft, dropped: Mapping[str, str], notes: Sequence[str]
) -> Encoder:
    spec = draft.spec
    model, fill_notes = fill(draft.model or build_model(spec), draft.tensors, spec.family)
    info = CheckpointInfo(
        source=str(container.path),
        sha256=container.sha256,
        format=f"{spec.family} ({container.format})",
        container=root,
        parameters=sum(p.numel() for p in model.parameters()),
        loaded_tensors=len(draft.tensors),
        encoder_tensors=len(model.state_dict()),
        dropped=dict(dropped),
        notes=(*notes, *draft.notes, *fill_notes, *container.notes),
    )
    return ViTEncoder(model, spec, info) if spec.arch["builder"] == "vit" else timm_encoder(model, spec, info)


def build_model(spec: EncoderSpec) -> Any:
    """The empty model of a spec. Raises CheckpointError for a builder that is not known."""
    builder = spec.arch.get("builder")
    if builder == "vit":
        return build_vit(spec.arch, device="meta")
    if builder == "timm" and isinstance(spec.arch.get("name"), str):
        return create_timm(spec.arch["name"], pretrained=False, **spec.arch.get("kwargs", {}))
    raise CheckpointError(f"the spec names no builder that is known here: {builder!r} (known: timm, vit)")


def fill(model: Any, tensors: Mapping[str, torch.Tensor], family: str) -> tuple[Any, tuple[str, ...]]:
    """Fill a model with exactly these tensors; returns it and notes on conversions.

    Raises:
        CheckpointError: keys are missing, left over or of another shape, or values are not finite.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    wrong = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if missing or unexpected or wrong:
        parts = [
            f"{len(names)} {what} ({_few(names)})"
            for names, what in ((missing, "missing"), (unexpected, "unexpected"), (wrong, "of another shape"))
            if names
        ]
        raise CheckpointError(f"the file does not fill the {family} encoder: {'; '.join(parts)}")
    notes = set()
    filled = {}
    for name, tensor in tensors.items():
        _check_values(name, tensor)
        wanted = expected[name].dtype
        if tensor.dtype != wanted:
            notes.add(f"weights converted from {tensor.dtype} to {wanted}".replace("torch.", ""))
        # A copy: the file stays mapped no longer, and may change or go away.
        filled[name] = tensor.detach().to(wanted, copy=True).contiguous()
    model.load_state_dict(filled, strict=True, assign=True)
    return model, tuple(sorted(notes))


def _check_values(name: str, tensor: torch.Tensor) -> None:
    if not storage_is_honest(tensor):
        raise CheckpointError(
            f"{name} claims {tensor.numel()} numbers but the file holds fewer; it is refused"
        )
    if not tensor.is_floating_point():
        return
    # The sum is a tenth of the cost of looking at every element, and is finite only if each of them is.
    if not torch.isfinite(tensor.sum(dtype=torch.float64)) and not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{name} holds {count} NaN or infinite values; the training diverged or the file broke"
        )
    if tensor.ndim > 1 and name.endswith(".weight") and tensor.numel() > 1:
        flat = tensor.reshape(-1)
        if flat[0] == flat[-1] and (flat == flat[0]).all():
            raise CheckpointError(f"{name} is {float(flat[0])} everywhere; these weights were never trained")


def inspect_checkpoint(reference: str) -> dict[str, Any]:
    """All that loading finds out about a reference, as JSON: for ``lmim-bench inspect``.

    Raises:
        CheckpointError: the reference cannot be loaded.
    """
    from ..encoders import load_encoder

    encoder = load_encoder(reference)
    spec, info = encoder.spec, encoder.info
    return {
        "source": info.source,
        "format": info.format,
        "container": info.container,
        "sha256": info.sha256,
        "fingerprint": encoder.fingerprint,
        "family": spec.family,
        "architecture": spec.arch,
        "parameters": info.parameters,
        "embed_dim": spec.embed_dim,
        "depth": spec.depth,
        "patch_size": spec.patch_size,
        "image_size": spec.image_size,
        "tokens": {
            "class": spec.has_cls,
            "registers": spec.arch.get("reg_tokens", 0),
            "patches": (spec.image_size // spec.patch_size) ** 2,
        },
        "preprocessing": {
            "mean": list(spec.mean),
            "std": list(spec.std),
            "interpolation": spec.interpolation,
            "crop_pct": spec.crop_pct,
        },
        "pooling": spec.pooling,
        "final_norm": spec.final_norm,
        "coverage": {
            "encoder_tensors": info.encoder_tensors,
            "loaded_tensors": info.loaded_tensors,
            "random_weights": info.random_weights,
        },
        "dropped": dict(info.dropped),
        "notes": list(info.notes),
    }
