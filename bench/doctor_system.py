"""What the doctor finds of the machine: versions, device, memory, room on the disks."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, Literal, NamedTuple

from .engine import resolve_device
from .errors import ConfigError, first_line
from .types import Frozen

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

Area = Literal["system", "disk", "data", "task", "checkpoint"]
GB = 1e9

_MEMORY_GB = {"cpu": 2.0, "cuda": 4.0}
_DISTRIBUTION = "lmim-bench"
_NAMED = ("torch", "timm", "faiss-cpu")
_DRIVER = Path("/proc/driver/nvidia/version")


class Check(Frozen):
    """One finding: what was looked at, whether it will do, and what mends it."""

    area: Area
    name: str
    status: Literal["pass", "warn", "fail"]
    found: str
    mend: str = ""


class Subject(NamedTuple):
    """What is looked at; its methods make the findings."""

    area: Area
    name: str

    def passes(self, found: str) -> Check:
        """It will do."""
        return Check(area=self.area, name=self.name, status="pass", found=found)

    def warns(self, found: str, mend: str) -> Check:
        """A run goes through, and the user should know."""
        return Check(area=self.area, name=self.name, status="warn", found=found, mend=mend)

    def fails(self, found: str, mend: str) -> Check:
        """A run would stop, or score what it should not."""
        return Check(area=self.area, name=self.name, status="fail", found=found, mend=mend)


def packages() -> Iterator[Check]:
    """Python and the packages that the distribution requires, against the versions that it asks for."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        listed = [Requirement(text) for text in requires(_DISTRIBUTION) or ()]
        python = SpecifierSet(str(metadata(_DISTRIBUTION)["Requires-Python"]))
    except PackageNotFoundError:
        yield Subject("system", "packages").warns(
            "lmim-bench is not installed, so that its requirements are not known",
            "pip install -e . in its folder",
        )
        return
    yield _versioned("python", platform.python_version(), python, f"use a Python {python}")
    others = []
    for one in listed:
        if one.marker is not None:  # of an extra
            continue
        mend = f'pip install "{one.name}{one.specifier}"'
        found = _versioned(one.name, _installed(one.name), one.specifier, mend)
        if one.name in _NAMED or found.status != "pass":
            yield found
        else:
            others.append(f"{one.name} {found.found}")
    yield Subject("system", "other packages").passes(", ".join(others))


def _versioned(name: str, installed: str | None, wanted: SpecifierSet, mend: str) -> Check:
    subject = Subject("system", name)
    if installed is None:
        return subject.fails("is not installed", mend)
    if not wanted.contains(installed, prereleases=True):
        return subject.fails(f"{installed} is installed, {wanted} is needed", mend)
    return subject.passes(installed)


def _installed(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    if name == "faiss-cpu":  # the GPU build and conda's go by other names
        with suppress(ImportError):
            import faiss

            return str(faiss.__version__)
    return None


def device(name: str) -> Check:
    """Whether the device is there and computes, its free memory, and whether it has bfloat16."""
    import torch

    subject = Subject("system", "device")
    try:
        where = resolve_device(name)
    except ConfigError as error:
        return subject.fails(f"{name} is not there", str(error))
    kind = where.split(":")[0]
    try:
        ones = torch.ones(64, 64, device=where)
        (ones @ ones).sum().item()
    except RuntimeError as error:
        mend = "install a build of torch for this device, or use --device cpu"
        return subject.fails(f"{where} does not compute: {first_line(error)}", mend)
    free = _free_memory(where)
    memory = "" if free is None else f", {free:.1f} GB of memory free"
    if kind == "cuda":
        bf16 = "" if torch.cuda.is_bf16_supported(including_emulation=False) else "no "
        found = f"{where} ({torch.cuda.get_device_name(where)}){memory}, {bf16}bf16"
    else:
        found = f"cpu, {torch.get_num_threads()} threads{memory}, bf16"
    if free is not None and free < _MEMORY_GB[kind]:
        return subject.warns(found, "end other programs there, or give a small --batch-size")
    if name == "auto" and kind == "cpu" and _DRIVER.exists():
        mend = "there is an NVIDIA driver that this torch cannot use: install its CUDA build"
        return subject.warns(found, mend)
    return subject.passes(found)


def shared_memory(workers: int) -> Check:
    """Whether so many decoding processes have room to hand over their images."""
    from .data.workers import MORE_SHARED_MEMORY, room_wanted, shared_room

    subject, free = Subject("system", "shared memory"), shared_room()
    if free is None:
        return subject.passes("without a limit that this system tells")
    found = f"{free / GB:.2f} GB free for {workers} decoding processes"
    if free < room_wanted(workers):
        return subject.warns(f"{found}, less than {room_wanted(workers) / GB:.2f}", MORE_SHARED_MEMORY)
    return subject.passes(found)


def _free_memory(where: str) -> float | None:
    """Free memory in GB; None where the system does not tell."""
    import torch

    if where.startswith("cuda"):
        return float(torch.cuda.mem_get_info(where)[0] / GB)
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 / GB
    return None


def room(option: Literal["--cache-dir", "--out"], folder: Path, needed: float, what: str) -> Check:
    """Whether a folder can be written, and has so many GB free."""
    subject = Subject("disk", option)
    there = existing(folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return subject.fails(f"{there} cannot be written: {error.strerror}", f"give another {option}")
    free = disk_usage(there).free / GB
    found = f"{folder}: {free:.1f} GB free for {what}"
    if free < needed:
        return subject.warns(found, f"free {needed - free:.1f} GB, or give {option} on a larger disk")
    return subject.passes(found)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
