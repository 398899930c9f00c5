"""The feature store: each image passes through the encoder once, whatever number of tasks need it.

A bank is a folder named by the hash of everything that decides its content (weights and spec, data,
view, precision, versions of what computes it). Each column is one ``.npy`` file, streamed to a temporary
name and renamed when whole, so a bank never holds a half-written column; columns that are missing are added
by a later pass. All columns of a bank have the rows of its index: where a pass reads other images than
the one before (a disk that failed then), the older columns go.

    <cache>/features/<key>/  meta.json  index.npy  cls@-1.npy  patches@-1.npy ...
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .atomic import atomic_write, write_json
from .cache import folder_bytes, staging
from .config import Precision
from .engine import Engine
from .environment import environment
from .errors import DataError, TaskError
from .names import digest
from .room import new_array, room_for
from .types import Array, Column, Dataset, FeatureBank, Features, Progress, Tap, View

FEATURES_VERSION = 1
"""Raised where a change of this code changes features: of an encoder, a view, a decoder."""
_COMPUTED_BY = ("torch", "timm", "pillow")
_TRIES = 3
ProgressFactory = Callable[[int, str], AbstractContextManager[Progress]]


@dataclass
class FeatureStore:
    """The cache of feature banks below one folder, bounded in size."""

    root: Path
    max_bytes: int
    workers: int = 0
    skip_broken: bool = False

    def bank(
        self,
        engine: Engine,
        data: Dataset,
        split_name: str,
        view: View,
        columns: Sequence[Column],
        progress: ProgressFactory,
    ) -> tuple[FeatureBank, tuple[str, ...]]:
        """The bank that holds these columns, extracted in one pass over the images where it is not there.

        Returns:
            The bank, and the ids of the broken images that were left out.

        Raises:
            DataError: a broken image (unless ``skip_broken``), no image, or no room on the disk.
            TaskError: a column that the encoder does not have.
        """
        split = data.splits[split_name]
        key = bank_key(engine.encoder.fingerprint, data, split_name, view, engine.precision, engine.device)
        folder = self.root / key
        for _ in range(_TRIES):
            missing = self.missing(key, columns)
            if missing:
                self._extract(engine, data, split_name, view, missing, folder, progress)
            try:
                meta, index, found = _read(folder, columns)
            except FileNotFoundError:  # another pass read other images, or another run needed the room
                continue
            except (ValueError, EOFError, KeyError):  # damaged: a disk that was full or lost its power
                with suppress(FileNotFoundError):  # another run removes it too
                    shutil.rmtree(folder)
                continue
            with suppress(OSError):  # a cache of others is read all the same
                os.utime(folder / "meta.json")  # the eviction order is by last use
            break
        else:
            raise DataError(
                f"{data.name}/{split_name} does not read twice the same, or {self.root} is too small for it; "
                "look at the disk, or raise --cache-size"
            )
        skipped = tuple(meta["skipped"])
        if skipped and not self.skip_broken:
            raise DataError(
                f"{data.name}/{split_name}: {skipped[0]} is broken; mend it, or leave {len(skipped)} "
                "broken image(s) out with --skip-broken"
            )
        labels = None if split.labels is None else np.asarray(split.labels)[index]
        bank = FeatureBank(
            columns=found,
            ids=[split.ids[i] for i in index],
            labels=labels,
            index=index,
            fingerprint=key,
            images_per_second=meta.get("images_per_second")
            if meta.get("machine") == _machine(engine)
            else None,
        )
        return bank, skipped

    def missing(self, key: str, columns: Sequence[Column]) -> list[Column]:
        """The columns that a bank does not hold yet."""
        folder, wanted = self.root / key, list(dict.fromkeys(columns))
        if not all((folder / name).is_file() for name in ("meta.json", "index.npy")):
            return wanted
        return [column for column in wanted if not _column_path(folder, column).is_file()]

    def _extract(
        self,
        engine: Engine,
        data: Dataset,
        split_name: str,
        view: View,
        columns: Sequence[Column],
        folder: Path,
        progress: ProgressFactory,
    ) -> None:
        from .data.loading import iterate_batches
        from .data.views import normalise

        split = data.splits[split_name]
        if not len(split):
            raise DataError(f"the split {split_name!r} of {data.name} holds no image")
        taps = tuple(dict.fromkeys(c.tap for c in columns))
        half = staging(folder)
        try:
            rows = _Rows(half, columns, len(split))
            kept: list[Array] = []
            broken: list[str] = []
            flight: _Flight | None = None
            batch_size = engine.batch_for(view.size, view.size)
            batches = iterate_batches(split, view, batch_size, self.workers, self.skip_broken, engine.device)
            title = f"features of {data.name}/{split_name} at {view.size} px"
            with progress(len(split), title) as bar, closing(batches):
                for positions, pixels, failed in batches:
                    broken += failed
                    bar.advance(len(positions) + len(failed))
                    if not len(positions):
                        continue
                    kept.append(positions)
                    images = normalise(pixels, view)
                    # While a GPU computes these, those of the batch before are written.
                    flight, landed = _Flight(engine, images, taps, columns), flight
                    if landed is not None:
                        rows.write(landed)
            if flight is None:
                raise DataError(f"every image of {data.name}/{split_name} is broken, first {broken[0]}")
            rows.write(flight)
            rows.close()
            index = np.concatenate(kept)
            self._publish(half, folder, engine, data, split_name, view, index, broken, rows.rate)
        finally:
            shutil.rmtree(half, ignore_errors=True)
        self._evict(keep=folder)

    def _publish(
        self,
        half: Path,
        folder: Path,
        engine: Engine,
        data: Dataset,
        split_name: str,
        view: View,
        index: Array,
        broken: Sequence[str],
        images_per_second: float,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "index.npy"
        if not _holds(known, index):
            for path in folder.glob("*.npy"):
                path.unlink()
            with atomic_write(known, "wb") as stream:  # before the columns, which are worth nothing without
                np.save(stream, index)
        for path in half.glob("*.npy"):
            path.replace(folder / path.name)
        write_json(
            folder / "meta.json",
            {
                "encoder": engine.encoder.fingerprint,
                "source": engine.encoder.info.source,
                "data": data.name,
                "data_fingerprint": data.fingerprint,
                "split": split_name,
                "view": asdict(view),
                "precision": engine.precision,
                "images": len(index),
                "skipped": list(broken),
                "images_per_second": images_per_second,
                "machine": _machine(engine),
            },
        )

    def _evict(self, keep: Path) -> None:
        """Delete the banks that were used longest ago until the cache fits; never the newest one."""
        banks = sorted((path.parent for path in self.root.glob("*/meta.json")), key=_last_used)
        total = sum(folder_bytes(b) for b in banks)
        for bank in banks:
            if total <= self.max_bytes:
                return
            if bank != keep:
                total -= folder_bytes(bank)
                shutil.rmtree(bank, ignore_errors=True)


class _Flight:
    """The columns of a batch on their way from the encoder to memory."""

    def __init__(self, engine: Engine, images: Any, taps: Sequence[Tap], columns: Sequence[Column]) -> None:
        self._begun = engine.moment()
        self._launched = engine.launch(images, taps).asked()
        found = self._launched.features
        self._values = {c: _values(c, found[c.tap]).to("cpu", non_blocking=True) for c in columns}
        self._ended = engine.moment()
        self.images = len(images)

    def land(self) -> dict[Column, Array]:
        """The values, once they are there. Raises TaskError where features are not finite."""
        self._ended.wait()
        self._launched.checked()
        return {column: values.numpy() for column, values in self._values.items()}

    @property
    def seconds(self) -> float:
        """How long the encoder took, once landed."""
        return self._ended.seconds_since(self._begun)


class _Rows:
    """Files of columns that grow by batches, and the speed at which the batches were encoded."""

    def __init__(self, folder: Path, columns: Sequence[Column], most: int) -> None:
        self._folder, self._columns, self._most = folder, columns, most
        self._files: dict[Column, np.memmap[Any, Any]] = {}
        self._row = 0
        self._laps: list[tuple[int, float]] = []

    def write(self, flight: _Flight) -> None:
        """Append a batch. Raises DataError where the disk has no room for all that is to come."""
        values = flight.land()
        if not self._files:
            self._allocate(values)
        for column, of_batch in values.items():
            self._files[column][self._row : self._row + flight.images] = of_batch
        self._row += flight.images
        self._laps.append((flight.images, flight.seconds))

    def close(self) -> None:
        """Bring everything to the disk, cut to the images that there were."""
        for column in self._columns:
            self._files.pop(column).flush()
            if self._row < self._most:
                _truncate(_column_path(self._folder, column), self._row)

    @property
    def rate(self) -> float:
        """Images a second; the first batch warms up, and counts only if alone."""
        laps = self._laps[1:] or self._laps
        return round(sum(n for n, _ in laps) / sum(s for _, s in laps), 2)

    def _allocate(self, first: Mapping[Column, Array]) -> None:
        shapes = {column: (self._most, *values.shape[1:]) for column, values in first.items()}
        what = f"the features {', '.join(column.id for column in shapes)}"
        needed = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
        mend = "free some, or set --cache-dir to a larger disk"
        with room_for(what, needed, self._folder.parent, mend):
            for column, shape in shapes.items():
                self._files[column] = new_array(_column_path(self._folder, column), np.float32, shape)


def _machine(engine: Engine) -> str:
    """What the speed of an encoder depends on beside the encoder."""
    return f"{platform.node()}, {environment(engine.device, engine.precision).device}"


@cache
def _computed_by() -> list[str]:
    return [f"{name} {version(name)}" for name in _COMPUTED_BY]


def bank_key(
    encoder: str, data: Dataset, split_name: str, view: View, precision: Precision, device: str
) -> str:
    """The name of a bank: a hash of all that decides its content, ``encoder`` being its fingerprint."""
    identity: dict[str, Any] = {
        "encoder": encoder,
        "data": data.fingerprint,
        "split": split_name,
        "view": asdict(view),
        "precision": precision,
        "device": device.split(":")[0],
        "version": FEATURES_VERSION,
        "computed by": _computed_by(),
    }
    return digest(identity)


def _last_used(bank: Path) -> float:
    """When a bank was used last; long ago where another run evicts it meanwhile."""
    try:
        return (bank / "meta.json").stat().st_mtime
    except FileNotFoundError:
        return 0.0


def merge_requests(
    requests: Sequence[tuple[str, View, Column]],
) -> dict[tuple[str, View], tuple[Column, ...]]:
    """All columns wanted of each (split, view), so that one pass serves every task."""
    merged: dict[tuple[str, View], dict[Column, None]] = {}
    for split, view, column in requests:
        merged.setdefault((split, view), {})[column] = None
    return {key: tuple(columns) for key, columns in merged.items()}


def _values(column: Column, features: Features) -> Any:
    value = {"cls": features.cls, "mean": features.mean, "patches": features.patches}[column.kind]
    if value is None:
        raise TaskError("this encoder has no class token; use pooling=mean")
    return value


def _column_path(folder: Path, column: Column) -> Path:
    return folder / f"{column.id}.npy"


def _read(folder: Path, columns: Sequence[Column]) -> tuple[dict[str, Any], Array, dict[str, Array]]:
    """The description, the index and the columns of a bank.

    Raises:
        FileNotFoundError: one of them is not there.
        ValueError, EOFError, KeyError: one is damaged, or they do not belong together.
    """
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if not isinstance(meta, dict) or not isinstance(meta["skipped"], list):
        raise ValueError("not the description of a bank")
    index = np.load(folder / "index.npy")
    found = {c.id: np.load(_column_path(folder, c), mmap_mode="r") for c in columns}
    if any(len(values) != len(index) for values in found.values()):
        raise ValueError("the columns are of different passes")
    return meta, index, found


def _holds(path: Path, values: Array) -> bool:
    """Whether a file holds this array; not where there is none or it is damaged."""
    try:
        return np.array_equal(np.load(path), values)
    except (FileNotFoundError, ValueError, EOFError):
        return False


def _truncate(path: Path, rows: int) -> None:
    source = np.load(path, mmap_mode="r")
    target = path.with_suffix(".cut")
    copy = new_array(target, source.dtype, (rows, *source.shape[1:]))
    for start in range(0, rows, 4096):
        copy[start : start + 4096] = source[start : min(rows, start + 4096)]
    copy.flush()
    target.replace(path)
