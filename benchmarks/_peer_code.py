"""What the comparisons of the tasks share: both sides in turn, peak memory of a child process, the lines."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _timing import Spread
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from lmim_bench.bench.environment import environment
from lmim_bench.bench.errors import ConfigError
from lmim_bench.bench.types import Array

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from toy import ToyContext, toy_context, value  # the test suite's Context over plain arrays

__all__ = [
    "Memory",
    "Spread",
    "ToyContext",
    "clusters",
    "compare",
    "find_peer",
    "git_blob",
    "options",
    "peak_memory",
    "start",
    "toy_context",
    "value",
    "write_json",
]

Build = Callable[[], Callable[[], Any]]
"""Prepares inputs and returns the work that is measured."""
_POLL = 0.005
_MB = 1024  # of the kilobytes in /proc


def options(
    description: str | None, *, peers: bool = True, rounds: int | None = 3, **sizes: int
) -> argparse.ArgumentParser:
    """A parser with the options of every comparison, and one for each of the sizes given. Without ``peers``
    there is no folder of them, without ``rounds`` each side is timed once.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"[{default}]")
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"times that each is timed [{rounds}]")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of both sides [all cores]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the features [0]")
    if peers:
        parser.add_argument(
            "--peers", type=Path, help="folder of the peers' checkouts; none: a plain statement"
        )
    parser.add_argument("--json", type=Path, help="where the numbers go as well")
    return parser


def start(args: argparse.Namespace, device: str = "cpu", precision: str = "fp32") -> dict[str, Any]:
    """Set the threads of every library, print the line of the machine, and return it for the JSON."""
    limit_threads(args.threads)
    found = environment(device, precision).model_dump(mode="json")
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "threads": args.threads,
        "arguments": {
            name: str(given) for name, given in vars(args).items() if name not in ("peers", "json")
        },
        "environment": found,
    }
    commit = (found["git_commit"] or "none")[:12] + (" with changes" if found["git_dirty"] else "")
    names = ("numpy", "torch", "scikit-learn", "faiss-cpu")
    packages = ", ".join(f"{name} {found['packages'].get(name)}" for name in names)
    where = "" if device == "cpu" else f"{found['device']}, {precision}, "
    print(
        f"{facts['date']}, commit {commit}, {where}{facts['processor']}, {args.threads} threads, Python "
        f"{found['python']}, {packages}",
        flush=True,
    )
    return facts


def limit_threads(threads: int) -> None:
    """The same number of threads for torch, BLAS and OpenMP, hence for either side."""
    torch.set_num_threads(threads)
    threadpool_limits(threads)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def find_peer(args: argparse.Namespace, folder: str, file: str, repository: str) -> Path | None:
    """The checkout of a peer, said aloud with the git blob of its file; None without ``--peers``."""
    if args.peers is None:
        print(f"without --peers: measured against a plain statement of what {repository} does", flush=True)
        return None
    path = args.peers / folder / file
    if not path.is_file():
        raise ConfigError(f"--peers {args.peers} holds no {folder}/{file}; clone {repository} there")
    print(f"against {repository}, {file} (git blob {git_blob(path)[:12]})", flush=True)
    return Path(args.peers / folder)


def git_blob(path: Path) -> str:
    """What git calls a file of this content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def clusters(
    rows: int, width: int, classes: int, noise: float, seed: int, *, decay: float = 0.5, part: int = 0
) -> tuple[Array, Array]:
    """Features as an encoder's: noisy classes whose spectrum falls as i^-decay; and labels (N,).

    Args:
        noise: standard deviation around a class mean, where class means have 1.
        part: another value gives other samples of the same classes.
    """
    shared, own = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1, part])
    scale = (np.arange(1, width + 1) ** -decay).astype(np.float32)
    turn = np.linalg.qr(shared.standard_normal((width, width)))[0].astype(np.float32)
    means = shared.standard_normal((classes, width)).astype(np.float32)
    labels = own.permutation(np.arange(rows) % classes)
    features = noise * own.standard_normal((rows, width), dtype=np.float32)
    features += means[labels]
    return np.asarray((features * scale) @ turn), labels


# ------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Memory:
    """Peak memory of a piece of work in a process of its own, in MB.

    Attributes:
        private: anonymous pages (polled), beyond those held when the work began.
        resident: all resident pages, mapped files included (the kernel's high-water mark), beyond the same.
        total_private: anonymous pages with everything that the process held before.
        mapped: the high-water mark less ``total_private``: pages of files, which the kernel can drop.
    """

    private: float
    resident: float
    total_private: float
    mapped: float


@dataclass(frozen=True)
class Comparison:
    """Seconds and memory of both sides, and theirs over ours round by round."""

    name: str
    ours: list[float]
    theirs: list[float]
    speedup: Spread
    our_memory: Memory | None = None
    their_memory: Memory | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.name}: ours {Spread.of(self.ours)} s, theirs {Spread.of(self.theirs)} s, "
            f"theirs / ours {self.speedup}"
        ]
        if self.our_memory and self.their_memory:
            ours, theirs = self.our_memory.resident, self.their_memory.resident
            lines.append(
                f"{self.name}: peak memory beyond the inputs, ours {ours:.0f} MB, theirs {theirs:.0f} MB, "
                f"theirs / ours {theirs / max(ours, 1):.1f}"
            )
        return "\n".join(lines)


def compare(
    ours: Mapping[str, Callable[[], Any]],
    theirs: Callable[[], Any],
    rounds: int,
    builds: tuple[Build, Build] | None = None,
    threads: int = 1,
    warm: bool = False,
) -> tuple[list[Comparison], dict[str, Any], Any]:
    """All sides in turn, then the memory of ours and of theirs in a process each.

    Args:
        ours: our ways to do the same, by name; each is compared with theirs.
        builds: of our and of their work, for the memory; they must be picklable, and may do a part of the
            work that needs no less memory than all of it.
        warm: run each side once before any is timed, as a GPU needs it.

    Returns:
        The comparisons, and what each side returned in the last round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ("theirs", *ours)}
    found: dict[str, Any] = {}
    for round_ in range(-warm, rounds):
        for name, work in (*ours.items(), ("theirs", theirs)):
            begun = time.perf_counter()
            found[name] = work()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - begun)
    memory = [peak_memory(build, threads)[0] for build in builds] if builds else [None, None]
    comparisons = []
    for name in ours:
        ratios = [their / our for our, their in zip(seconds[name], seconds["theirs"], strict=True)]
        comparisons.append(Comparison(name, seconds[name], seconds["theirs"], Spread.of(ratios), *memory))
        print(comparisons[-1], flush=True)
        memory = [None, None]
    return comparisons, found, found["theirs"]


def peak_memory(build: Build, threads: int) -> tuple[Memory, Any]:
    """Peak memory of the work that ``build`` prepares, in a new process (Linux), and what it returns."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(there, build, threads))
    process.start()
    there.close()
    here.recv()
    before, resident = _status(process.pid, "RssAnon"), _status(process.pid, "VmRSS")
    here.send("go")
    private = before
    while not here.poll(_POLL):
        private = max(private, _status(process.pid, "RssAnon"))
    result = here.recv()
    high = _status(process.pid, "VmHWM")
    here.send("end")
    process.join()
    return Memory(
        (private - before) / _MB, (high - resident) / _MB, private / _MB, (high - private) / _MB
    ), result


def _child(pipe: Connection, build: Build, threads: int) -> None:
    limit_threads(threads)
    work = build()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    pipe.send("ready")
    pipe.recv()
    pipe.send(work())
    pipe.recv()
    os._exit(0)  # a peer's idle worker processes would be waited for, for minutes


def _status(pid: int | None, field: str) -> int:
    """A line of /proc/PID/status in kilobytes; 0 where the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(field + ":")), 0)


def write_json(
    path: Path | None, facts: Mapping[str, Any], comparisons: Sequence[Comparison], **more: Any
) -> None:
    """All numbers of a script."""
    if path:
        payload = {**facts, "comparisons": [asdict(c) for c in comparisons], **more}
        path.write_text(json.dumps(payload, indent=2, default=float) + "\n", encoding="utf-8")
