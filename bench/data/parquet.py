"""Parquet shards as Hugging Face writes them: a column of encoded images, a column of class numbers.

An image is read with the row group that it lies in, and the last few groups stay decoded, so a pass in order
reads each group once. Random access over large row groups costs a group an image.
"""

from __future__ import annotations

import contextlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..types import Array
from .manifest import Manifest
from .reading import not_read
from .shards import Found, RawLabel, Reader, ShardSplit

IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "fine_label", "fine_labels", "cls", "class", "target")
GROUPS_KEPT = 4
BYTES_KEPT = 256 * 2**20
"""Decoded row groups that a process keeps: at most so many, and so many bytes besides the last one."""


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("reading parquet needs pyarrow: pip install 'lmim-bench[parquet]'") from error
    return pyarrow


class RowGroupReader(Reader):
    """Reads a row of a row group of one column of bytes."""

    def __init__(self, column: str) -> None:
        self.column = column
        self._groups: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        super().__init__()

    def close(self) -> None:
        """Forget the decoded groups."""
        self._groups.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"column": self.column}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.column, self._groups = state["column"], OrderedDict()
        super().__setstate__(state)

    def _read(self, path: Path, group: int, row: int) -> bytes:
        if (path, group) not in self._groups:
            self._groups[path, group] = _column(path, self.column, group)
            while len(self._groups) > 1 and (
                len(self._groups) > GROUPS_KEPT or sum(g.nbytes for g in self._groups.values()) > BYTES_KEPT
            ):
                self._groups.popitem(last=False)
        self._groups.move_to_end((path, group))
        rows = self._groups[path, group]
        if row >= len(rows):
            raise EOFError("the shard has changed and ends before it")
        content: bytes | None = rows[row].as_py()
        if content is None:
            raise EOFError("the row holds no bytes (a path alone cannot be followed)")
        return content


def open_parquet(root: Path, shards: Sequence[str], cache_dir: Path | None) -> Found:
    """The rows of these shards, in their order.

    Raises:
        DataError: pyarrow is not there, a shard is broken, or has no column of images.
    """
    _pyarrow()
    ids: list[str] = []
    where: list[Array] = []
    labels: list[RawLabel] = []
    indexes: list[dict[str, Any]] = []
    for number, shard in enumerate(shards):
        path = root / shard
        index = Manifest(root, [(shard, -1)], cache_dir).recall("parquet-1", partial(index_parquet, path))
        indexes.append(index)
        if index["image"] != indexes[0]["image"] or index["names"] != indexes[0]["names"]:
            raise DataError(f"{path} has other columns or classes than {root / shards[0]}")
        sizes = np.asarray(index["groups"], dtype=np.int64)
        rows = int(sizes.sum())
        group = np.repeat(np.arange(len(sizes)), sizes)
        row = np.arange(rows) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        where.append(np.stack([np.full(rows, number), group, row], axis=1).astype(np.int64))
        ids += [f"{shard}/{position:06d}" for position in range(rows)]
        labels += [index["problem"]] * rows if index["problem"] else index["labels"]
    if not ids:
        raise DataError(f"{root / shards[0]} holds no rows")
    reader = RowGroupReader(indexes[0]["image"])
    split = ShardSplit(root, list(shards), ids, np.concatenate(where), reader)
    return Found(split, labels, indexes[0]["names"])


def index_parquet(path: Path) -> dict[str, Any]:
    """Column of the images, rows of each group, label of each row (None: no label), names of the classes;
    ``problem`` says in words why there are no labels though a column is called so.

    Raises:
        DataError: the file is broken, or it cannot be told which column holds the images.
    """
    types = _pyarrow().types
    with _opened(path) as file:
        schema, footer = file.schema_arrow, file.metadata
        image = _image_column(path, schema, types)
        names = _class_label_names(schema)
        label = next((name for name in LABEL_NAMES if name in schema.names), None)
        if label is None and len(names) == 1:
            label = next(iter(names))
        problem, labels = None, [None] * footer.num_rows
        if label is not None and not types.is_integer(schema.field(label).type):
            problem = f"has no whole number in the column {label} but {schema.field(label).type}"
        elif label is not None:
            column = file.read(columns=[label], use_threads=False).column(label).to_pylist()
            labels = [None if value == -1 else value for value in column]
        groups = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
    return {
        "image": image,
        "groups": groups,
        "labels": labels,
        "problem": problem,
        "names": names.get(label or "", []),
    }


def _image_column(path: Path, schema: Any, types: Any) -> str:
    """The column to read, ``image`` or ``image.bytes``."""
    columns: dict[str, str] = {}
    for column in schema:
        if types.is_binary(column.type) or types.is_large_binary(column.type):
            columns[column.name] = column.name
        elif types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            columns[column.name] = f"{column.name}.bytes"
    named = next((name for name in IMAGE_NAMES if name in columns), None)
    if named is None and len(columns) == 1:
        named = next(iter(columns))
    if named is None:
        which = f"several columns of bytes ({', '.join(columns)})" if columns else "no column of image bytes"
        raise DataError(f"{path} has {which}; the images must be a column of bytes called image or img")
    return columns[named]


def _class_label_names(schema: Any) -> dict[str, list[str]]:
    """Names of the classes of every ClassLabel column, from what Hugging Face leaves in the schema."""
    found: dict[str, list[str]] = {}
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, RecursionError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        for column, feature in features.items():
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and column in schema.names:
                found[column] = [str(name) for name in feature.get("names") or ()]
    return found


def _column(path: Path, column: str, group: int) -> Any:
    with _opened(path) as file:
        read = file.read_row_group(group, columns=[column], use_threads=False).column(0)
    return read.flatten()[0] if _pyarrow().types.is_struct(read.type) else read


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, its columns read in this thread alone: pyarrow's own threads do not survive a fork."""
    pyarrow = _pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            yield file
    except (pyarrow.ArrowException, OSError, ValueError, LookupError) as error:
        raise not_read(path, error, "is broken or no parquet") from error
