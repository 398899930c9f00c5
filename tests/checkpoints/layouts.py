"""Checkpoints as their trainers write them, rebuilt from keys and shapes; and what the originals gave.

A layout is two files in ``references``: ``NAME.json`` has the tree of the file (keys, shapes, plain
values), and ``NAME.npz`` the features that the original code gave for it, with the few values that are no
free choice (buffers). All other values follow from the place of a tensor in the file, so that no weights
need keeping. ``originals`` has the scripts that made the references, one for each repository, and a
README.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

REFERENCES = Path(__file__).with_name("references")
Size = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """One recorded checkpoint.

    Attributes:
        name: of the two files.
        made_by: repository, commit and class that gave the features.
        options: what the reference needs after ``#``, or nothing.
        expect: fields of the encoder's spec, its arch or its info, as they must come out.
        sizes: name -> (height, width) of the images.
        features: ``SIZE/COLUMN`` -> array, with the columns as the feature bank names them (``cls@-1``).
    """

    name: str
    made_by: str
    options: str
    expect: Mapping[str, Any]
    sizes: Mapping[str, Size]
    features: Mapping[str, np.ndarray]


def names() -> list[str]:
    """All layouts that were recorded."""
    return sorted(path.stem for path in REFERENCES.glob("*.json"))


def write(name: str, folder: Path) -> tuple[str, Layout]:
    """Write the checkpoint of a layout; returns the reference to load it by, and the layout."""
    stated = json.loads((REFERENCES / f"{name}.json").read_text())
    arrays = dict(np.load(REFERENCES / f"{name}.npz"))
    values = {key.removeprefix("value:"): array for key, array in arrays.items() if key.startswith("value:")}
    place = folder / name
    place.mkdir()
    for file, content in stated["files"].items():
        target = place / file
        if isinstance(content, str):
            target.write_text(content)
        elif file.endswith(".json"):
            target.write_text(json.dumps(content))
        else:
            payload = _grow(content, (file,), values)
            if file.endswith(".safetensors"):
                save_file(payload, target, metadata={"format": "pt"})
            else:
                torch.save(payload, target)
    features = {key: array for key, array in arrays.items() if not key.startswith("value:")}
    layout = Layout(name, stated["made_by"], stated["options"], stated["expect"], stated["sizes"], features)
    reference = place if stated["load"] is None else place / stated["load"]
    return f"{reference}{stated['options']}", layout


def images(size: Sequence[int]) -> torch.Tensor:
    """Two images (2, 3, H, W) of normal noise, as after normalisation; the same on every machine."""
    rng = np.random.default_rng(list(size))
    return torch.from_numpy(rng.standard_normal((2, 3, *size)).astype(np.float32))


def record(
    name: str,
    *,
    made_by: str,
    files: Mapping[str, Any],
    features: Callable[[torch.Tensor], Mapping[str, torch.Tensor]],
    sizes: Mapping[str, Size],
    load: str | None,
    options: str = "",
    keep: str = "",
    expect: Mapping[str, Any] | None = None,
) -> None:
    """Record a checkpoint and what the original code makes of it.

    Args:
        name: of the layout.
        made_by: repository, commit and class.
        files: file name -> content: what ``torch.save`` or ``save_file`` is given, whose tensors must share
            their memory with the original model, as ``state_dict()`` does; or text, or JSON for ``*.json``.
        features: runs the original on images (B, 3, H, W); column (``cls@-1``, ``mean@-1``,
            ``patches@-1`` with patches (B, h, w, D), ``patches@-2:raw`` ...) -> features.
        sizes: ``native`` and, where the original takes it, a larger one that is not square.
        load: the file that is loaded, or None for the folder.
        options: what the reference needs, such as ``#heads=4``.
        keep: pattern of the places (``file/key/key``) whose values are stored and not drawn: buffers.
        expect: see ``Layout``.
    """
    values: dict[str, np.ndarray] = {}
    seen: dict[int, str] = {}

    def state(node: Any, path: tuple[str, ...]) -> Any:
        place = "/".join(path)
        if isinstance(node, torch.Tensor):
            kept = bool(keep) and re.search(keep, place) is not None
            tied = seen.setdefault(node.data_ptr() or id(node), place)
            if kept or not node.is_floating_point():
                values[place] = node.detach().float().numpy() if node.is_floating_point() else node.numpy()
            elif tied != place:
                return {"tensor": list(node.shape), "dtype": str(node.dtype)[6:], "as": tied}
            else:
                node.data.copy_(draw(place, tuple(node.shape)))
            return {"tensor": list(node.shape), "dtype": str(node.dtype)[6:]}
        if isinstance(node, argparse.Namespace):
            return {"namespace": vars(node)}
        if isinstance(node, Mapping):
            return {"dict": {str(key): state(value, (*path, str(key))) for key, value in node.items()}}
        if isinstance(node, list | tuple):
            return {"list": [state(value, (*path, str(i))) for i, value in enumerate(node)]}
        return {"value": node}

    tree = {
        file: content if isinstance(content, str) or file.endswith(".json") else state(content, (file,))
        for file, content in files.items()
    }
    arrays = {}
    with torch.inference_mode():
        for title, size in sizes.items():
            for column, tensor in features(images(size)).items():
                arrays[f"{title}/{column}"] = tensor.detach().float().numpy()
    stated = {
        "made_by": made_by,
        "load": load,
        "options": options,
        "expect": dict(expect or {}),
        "sizes": {title: list(size) for title, size in sizes.items()},
        "files": tree,
    }
    REFERENCES.mkdir(exist_ok=True)
    (REFERENCES / f"{name}.json").write_text(
        json.dumps(stated, separators=(",", ":"), sort_keys=False) + "\n"
    )
    stored: dict[str, Any] = {f"value:{place}": value for place, value in values.items()} | arrays
    np.savez_compressed(REFERENCES / f"{name}.npz", **stored)
    for key, array in arrays.items():
        print(f"{name:<28} {key:<24} {array.shape!s:<18} std {array.std():.3f}")


def draw(place: str, shape: Sequence[int]) -> torch.Tensor:
    """Values of a tensor from its place in the file: scaled like weights, near one where they multiply."""
    seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big")
    noise = np.random.default_rng(seed).standard_normal(tuple(shape))
    last = place.rpartition("/")[2].rpartition(".")[2]
    if len(shape) >= 2 and shape[0] > 1:
        noise /= math.sqrt(math.prod(shape[1:]))
    elif len(shape) >= 2:
        noise *= 0.5
    elif last == "running_var":
        noise = 1 + 0.1 * np.abs(noise)
    elif last in ("weight", "scale") or last.startswith(("gamma", "lambda")):
        noise = 1 + 0.1 * noise
    else:
        noise *= 0.1
    return torch.from_numpy(noise.astype(np.float32))


def _grow(node: Mapping[str, Any], path: tuple[str, ...], values: Mapping[str, np.ndarray]) -> Any:
    """The content of a file from its stated tree."""
    if "tensor" in node:
        place = node.get("as") or "/".join(path)
        dtype = getattr(torch, node["dtype"])
        if place in values:
            return torch.from_numpy(values[place].copy()).to(dtype)
        return draw(place, node["tensor"]).to(dtype)
    if "namespace" in node:
        return argparse.Namespace(**node["namespace"])
    if "dict" in node:
        return {key: _grow(value, (*path, key), values) for key, value in node["dict"].items()}
    if "list" in node:
        return [_grow(value, (*path, str(i)), values) for i, value in enumerate(node["list"])]
    return node["value"]


def tolerance(encoder: Any) -> float:
    """The greatest difference that counts as equal. Queries and keys that the original rounds to bfloat16 on
    their way turn at ties, and another CPU adds its sums in another order.
    """
    return 2e-3 if encoder.spec.arch.get("rope_dtype") == "bfloat16" else 1e-4


def differences(layout: Layout, encoder: Any) -> Iterator[tuple[str, float]]:
    """``SIZE/COLUMN`` and the greatest difference between the encoder's feature and the original's."""
    from lmim_bench.bench.types import Tap

    for title, size in layout.sizes.items():
        wanted = {key: array for key, array in layout.features.items() if key.startswith(f"{title}/")}
        taps = {}
        for key in wanted:
            found = re.fullmatch(r"\w+/(cls|mean|patches)@(-\d+)(:raw)?", key)
            assert found is not None, key
            taps[key] = (found[1], Tap(int(found[2]), found[3] is None))
        features = encoder(images(size), tuple({tap for _, tap in taps.values()}))
        for key, array in wanted.items():
            kind, tap = taps[key]
            ours = getattr(features[tap], kind)
            assert ours is not None, f"{key}: the encoder has no {kind}"
            assert tuple(ours.shape) == array.shape, f"{key}: {tuple(ours.shape)} for {array.shape}"
            yield key, float((ours - torch.from_numpy(array)).abs().max())
