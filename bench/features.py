"""The feature store: each image passes through the encoder once, whatever number of tasks need it.

A bank is a folder named by the hash of everything that decides its content (weights and spec, data,
view, precision). Each column is one ``.npy`` file, streamed to a temporary name and renamed when whole,
so a bank never holds a half-written column; columns that are missing are added by a later pass.

    <cache>/features/<key>/  meta.json  index.npy  cls@-1.npy  patches@-1.npy ...
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .config import Precision
from .engine import Engine
from .errors import DataError, TaskError
from .results import atomic_write, write_json
from .types import Array, Column, Dataset, FeatureBank, Features, Progress, View

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
        missing = self.missing(key, columns)
        if missing:
            self._extract(engine, data, split_name, view, missing, folder, progress)
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        skipped = tuple(meta["skipped"])
        if skipped and not self.skip_broken:
            raise DataError(
                f"{data.name}/{split_name}: {skipped[0]} is broken; mend it, or leave {len(skipped)} "
                "broken image(s) out with --skip-broken"
            )
        os.utime(folder / "meta.json")  # the eviction order is by last use
        index = np.load(folder / "index.npy")
        labels = None if split.labels is None else np.asarray(split.labels)[index]
        bank = FeatureBank(
            columns={c.id: np.load(_column_path(folder, c), mmap_mode="r") for c in columns},
            ids=[split.ids[i] for i in index],
            labels=labels,
            index=index,
            fingerprint=key,
            images_per_second=meta.get("images_per_second"),
        )
        return bank, skipped

    def missing(self, key: str, columns: Sequence[Column]) -> list[Column]:
        """The columns that a bank does not hold yet."""
        folder, wanted = self.root / key, list(dict.fromkeys(columns))
        if not (folder / "meta.json").is_file():
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
        from .data.loading import iterate_batches, normalise

        split = data.splits[split_name]
        if not len(split):
            raise DataError(f"the split {split_name!r} of {data.name} holds no image")
        taps = tuple(dict.fromkeys(c.tap for c in columns))
        self.root.mkdir(parents=True, exist_ok=True)
        staging = self.root / f".{folder.name}.{os.getpid()}.tmp"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            writers: dict[str, np.memmap[Any, Any]] = {}
            kept: list[Array] = []
            broken: list[str] = []
            row = 0
            clock = _Clock()
            batch_size = engine.batch_for(view.size, view.size)
            with progress(len(split), f"features of {data.name}/{split_name} at {view.size} px") as bar:
                for positions, pixels, failed in iterate_batches(
                    split, view, batch_size, self.workers, self.skip_broken
                ):
                    broken += failed
                    bar.advance(len(positions) + len(failed))
                    if not len(positions):
                        continue
                    images = normalise(pixels.to(engine.device, non_blocking=True), view)
                    with clock.time(len(positions)):
                        found = engine.encode(images, taps)
                        batch = {c: _values(c, found[c.tap]).cpu().numpy() for c in columns}
                    for column, values in batch.items():
                        if column.id not in writers:
                            writers[column.id] = self._allocate(staging, column, len(split), values)
                        writers[column.id][row : row + len(values)] = values
                    kept.append(positions)
                    row += len(positions)
            if not row:
                raise DataError(f"every image of {data.name}/{split_name} is broken, first {broken[0]}")
            for column in columns:
                writers[column.id].flush()
                if row < len(split):
                    _truncate(staging / f"{column.id}.npy", row)
            writers.clear()
            index = np.concatenate(kept)
            self._publish(staging, folder, engine, data, split_name, view, index, broken, clock.rate)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        self._evict(keep=folder)

    def _allocate(self, staging: Path, column: Column, n: int, first: Array) -> np.memmap[Any, Any]:
        needed = n * int(np.prod(first.shape[1:])) * 4
        free = shutil.disk_usage(staging).free
        if needed > free:
            raise DataError(
                f"the features {column.id} need {needed / 1e9:.1f} GB and {staging.parent} has "
                f"{free / 1e9:.1f} GB free; free some, or set --cache-dir to a larger disk"
            )
        return np.lib.format.open_memmap(
            staging / f"{column.id}.npy", mode="w+", dtype=np.float32, shape=(n, *first.shape[1:])
        )

    def _publish(
        self,
        staging: Path,
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
        for path in staging.glob("*.npy"):
            path.replace(folder / path.name)
        with atomic_write(folder / "index.npy", "wb") as stream:
            np.save(stream, index)
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
            },
        )

    def _evict(self, keep: Path) -> None:
        """Delete the banks that were used longest ago until the cache fits; never the newest one."""
        banks = sorted(
            (p.parent for p in self.root.glob("*/meta.json")), key=lambda p: (p / "meta.json").stat().st_mtime
        )
        total = sum(folder_bytes(b) for b in banks)
        for bank in banks:
            if total <= self.max_bytes:
                return
            if bank != keep:
                total -= folder_bytes(bank)
                shutil.rmtree(bank, ignore_errors=True)


class _Clock:
    """Images a second over the batches that were timed; the first one warms up, and counts only if alone."""

    def __init__(self) -> None:
        self._laps: list[tuple[int, float]] = []

    @contextmanager
    def time(self, images: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._laps.append((images, time.perf_counter() - start))

    @property
    def rate(self) -> float:
        laps = self._laps[1:] or self._laps
        return round(sum(n for n, _ in laps) / sum(s for _, s in laps), 2)


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
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def folder_bytes(folder: Path) -> int:
    """The size of the files directly in a folder; files that vanish meanwhile count nothing."""
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


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


def _truncate(path: Path, rows: int) -> None:
    source = np.load(path, mmap_mode="r")
    target = path.with_suffix(".cut")
    copy = np.lib.format.open_memmap(target, mode="w+", dtype=source.dtype, shape=(rows, *source.shape[1:]))
    for start in range(0, rows, 4096):
        copy[start : start + 4096] = source[start : min(rows, start + 4096)]
    copy.flush()
    target.replace(path)
