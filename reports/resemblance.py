"""How alike the features of two checkpoints are: CKA over the images that both kept features of."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..bench.types import Array
from ..tasks._math.representation import cka
from .model import Column
from .pictures import inside

_FEWEST = 4


@dataclass(frozen=True)
class Resemblance:
    """CKA between checkpoints under one artefact name.

    Attributes:
        title: of the artefact.
        caption: of the artefact.
        checkpoints: index of each, in the order of ``values``.
        values: debiased linear CKA, (C, C); 1 on the diagonal.
        images: how many images all of them kept features of.
    """

    title: str
    caption: str
    checkpoints: tuple[int, ...]
    values: Array
    images: int


def resemblances(column: Column) -> tuple[list[Resemblance], list[str]]:
    """One for each name that two checkpoints or more kept features under, of their first seeds; and what is
    wrong with files.

    Raises:
        DataError: a path leads out of its run folder.
    """
    groups: dict[str, list[tuple[int, Path, str, str, str]]] = {}
    for index, entries in enumerate(column.cells):
        for entry in entries[:1]:
            for artefact in entry.result.artefacts:
                if artefact.kind == "features" and entry.folder is not None:
                    for file in artefact.files:
                        found = (index, entry.folder, file, artefact.title, artefact.caption)
                        groups.setdefault(artefact.name, []).append(found)
    out, problems = [], []
    for members in groups.values():
        read: dict[int, dict[str, Array]] = {}
        for index, folder, file, _, _ in members:
            try:
                read[index] = _rows(inside(folder, file))
            except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
                missing = isinstance(error, FileNotFoundError)
                problems.append(f"{file} {'is missing' if missing else 'cannot be read as features'}")
        common = _common(list(read.values()))
        if len(read) > 1 and len(common) >= _FEWEST:
            values = cka([np.stack([rows[key] for key in common]) for rows in read.values()])
            _, _, _, title, caption = members[0]
            out.append(Resemblance(title, caption, tuple(read), values, len(common)))
    return out, problems


def _rows(path: Path) -> dict[str, Array]:
    with np.load(path) as arrays:
        features, ids = arrays["features"], arrays["ids"]
    if features.ndim != 2 or len(features) != len(ids) or not np.isfinite(features).all():
        raise ValueError("not one finite row for each id")
    return dict(zip(ids.tolist(), features.astype(np.float64), strict=True))


def _common(sets: Sequence[dict[str, Array]]) -> list[str]:
    return [key for key in sets[0] if all(key in other for other in sets)] if sets else []
