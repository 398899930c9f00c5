"""A corpus of malicious files: none of them runs anything, each ends in one line.

Every attack would leave a canary file. The payloads themselves are shown to work: a plain pickle runs them.
"""

from __future__ import annotations

import argparse
import io
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmim_bench.bench.checkpoints import open_checkpoint
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import CheckpointError

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3)}


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


class Stateful:
    """Pickles as a call whose result is then given a state (BUILD)."""

    def __init__(self, function: Any, arguments: tuple[Any, ...], state: Any) -> None:
        self.parts = function, arguments, state

    def __reduce__(self) -> Any:
        return self.parts


def code(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()"


def run(canary: Path) -> Call:
    return Call(eval, code(canary))


# ------------------------------------------------------------------------------------------- by objects

OBJECTS: dict[str, Callable[[Path], Any]] = {
    "at the top": run,
    "beside the weights": lambda c: {"model": WEIGHTS, "x": run(c)},
    "as a key": lambda c: {"model": WEIGHTS, ("x", run(c)): 1},
    "in a list": lambda c: {"model": WEIGHTS, "history": [1, [2, run(c)]]},
    "in the state of the optimizer": lambda c: {"model": WEIGHTS, "optimizer": {"state": {0: run(c)}}},
    "in an attribute of a namespace": lambda c: {
        "model": WEIGHTS,
        "args": argparse.Namespace(lr=1, hook=run(c)),
    },
    "as the state of a namespace": lambda c: {
        "model": WEIGHTS,
        "args": Stateful(argparse.Namespace, (), {"x": run(c)}),
    },
    "in an ordered dict": lambda c: OrderedDict(model=WEIGHTS, x=run(c)),
    "getattr of a module": lambda c: {"m": WEIGHTS, "x": Call(getattr, Call(__import__, "os"), "system")},
    "a file written by an allowed library": lambda c: {
        "m": WEIGHTS,
        "x": Call(torch.save, {"a": 1}, str(c)),
    },
    "a path that is touched": lambda c: {"m": WEIGHTS, "x": Call(Path.touch, c)},
    "a module of torch": lambda c: {"m": WEIGHTS, "x": Call(torch.hub.load, str(c.parent), "f")},
    "a rebuild of something that calls": lambda c: {
        "m": WEIGHTS,
        "x": Call(torch._utils._rebuild_tensor_v2, run(c), 0, (1,), (1,), False, OrderedDict()),
    },
    "a parameter of something that calls": lambda c: {
        "m": WEIGHTS,
        "x": Call(torch._utils._rebuild_parameter, run(c), False, OrderedDict()),
    },
    "a type made from nothing": lambda c: {"m": WEIGHTS, "x": Call(type, "T", (), {"__del__": None})},
    "an array that is rebuilt": lambda c: {"m": WEIGHTS, "x": Call(pickle.loads, pickle.dumps(run(c)))},
}


def check(path: Path, canary: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_encoder(str(path))
    text = str(caught.value)
    assert "\n" not in text
    assert "weights_only=False" not in text
    assert not canary.exists()
    return text


@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before zip"])
def test_no_object_runs(make: Callable[[Path], Any], zipped: bool, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    torch.save(make(canary), path, _use_new_zipfile_serialization=zipped)
    assert "is refused: its pickle names" in check(path, canary)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("make", [OBJECTS["at the top"], OBJECTS["beside the weights"]])
def test_no_pickle_of_any_protocol_runs(make: Callable[[Path], Any], protocol: int, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    content = pickle.dumps(make(canary), protocol=protocol)
    (tmp_path / "evil.pkl").write_bytes(content)
    check(tmp_path / "evil.pkl", canary)
    archive(tmp_path / "evil.pth", content)
    check(tmp_path / "evil.pth", canary)
    pickle.loads(content)
    assert canary.exists(), "the attack itself does nothing"


# ------------------------------------------------------------------------------------------- by opcodes


def archive(path: Path, content: bytes) -> None:
    """A zip as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        target.writestr("evil/data.pkl", content)
        target.writestr("evil/byteorder", "little")
        target.writestr("evil/version", "3\n")


def short(text: str) -> bytes:
    raw = text.encode()
    return b"\x8c" + struct.pack("B", len(raw)) + raw


def unicode(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


OPCODES: dict[str, Callable[[Path], bytes]] = {
    "GLOBAL and REDUCE": lambda c: b"\x80\x02c__builtin__\neval\n(" + unicode(code(c)) + b"tR.",
    "GLOBAL under the name of today": lambda c: b"\x80\x02cbuiltins\neval\n(" + unicode(code(c)) + b"tR.",
    "STACK_GLOBAL": lambda c: (
        b"\x80\x04" + short("builtins") + short("eval") + b"\x93(" + unicode(code(c)) + b"tR."
    ),
    "STACK_GLOBAL through the memo": lambda c: (
        b"\x80\x04"
        + short("builtins")
        + b"\x94"
        + short("eval")
        + b"\x94h\x00h\x01\x93("
        + unicode(code(c))
        + b"tR."
    ),
    "INST": lambda c: b"(V" + code(c).encode() + b"\nibuiltins\neval\n.",
    "OBJ": lambda c: b"(cbuiltins\neval\nV" + code(c).encode() + b"\no.",
    "NEWOBJ": lambda c: b"\x80\x02cbuiltins\neval\n(" + unicode(code(c)) + b"t\x81.",
    "NEWOBJ_EX": lambda c: b"\x80\x04cbuiltins\neval\n(" + unicode(code(c)) + b"t}\x92.",
    "a dotted name": lambda c: b"\x80\x04cargparse\nNamespace.__init__.__globals__\n(tR.",
    "an attribute of an allowed class": lambda c: b"\x80\x02cargparse\nNamespace.__init__\n(tR.",
    "a name in another alphabet": lambda c: b"\x80\x04" + short("аrgparse") + short("Namespace") + b"\x93)R.",
    "a module that looks allowed": lambda c: (
        b"\x80\x02cnumpy.core.multiarray\nfromfile\n(" + unicode(str(c)) + b"tR."
    ),
    "a package that looks allowed": lambda c: b"\x80\x02comegaconf_\nrun\n(tR.",
    "a submodule that would be imported": lambda c: (
        b"\x80\x02comegaconf.dictconfig.os\nsystem\n(" + unicode(f"touch {c}") + b"tR."
    ),
    "a path's method": lambda c: b"\x80\x02cpathlib\nPath.touch\n(" + unicode(str(c)) + b"tR.",
    "an extension code": lambda c: b"\x80\x02\x82\x01.",
    "a persistent id that is no storage": lambda c: (
        b"\x80\x02("
        + unicode("storage")
        + b"cbuiltins\neval\n"
        + unicode(code(c))
        + unicode("cpu")
        + b"K\x01tQ."
    ),
    "a persistent id of text": lambda c: b"P" + code(c).encode() + b"\n.",
    "BUILD on a class": lambda c: (
        b"\x80\x02cargparse\nNamespace\n}" + unicode("__init__") + b"cbuiltins\neval\nsb."
    ),
    "BUILD with __setstate__": lambda c: (
        b"\x80\x02cargparse\nNamespace\n)\x81}"
        + unicode("__setstate__")
        + b"cbuiltins\neval\nsb"
        + unicode(code(c))
        + b"b."
    ),
    "a stack that is empty": lambda c: b"\x80\x02R.",
    "a memo that is empty": lambda c: b"\x80\x02h\x05.",
    "a huge length": lambda c: b"\x80\x04\x8e" + b"\xff" * 8 + b".",
    "no end": lambda c: b"\x80\x02}" + unicode("a") * 10,
    "deep nesting": lambda c: b"\x80\x02" + b"(" * 10_000 + b"l" * 10_000 + b".",
}


@pytest.mark.parametrize("make", OPCODES.values(), ids=OPCODES)
def test_no_opcode_runs(make: Callable[[Path], bytes], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    content = make(canary)
    (tmp_path / "evil.pkl").write_bytes(content)
    check(tmp_path / "evil.pkl", canary)
    archive(tmp_path / "evil.pth", content)
    check(tmp_path / "evil.pth", canary)


@pytest.mark.parametrize("name", ["GLOBAL under the name of today", "STACK_GLOBAL", "INST", "OBJ"])
def test_the_opcodes_do_run_in_a_plain_pickle(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickle.loads(OPCODES[name](canary))
    assert canary.exists()


def test_random_changes_of_a_good_pickle_run_nothing(tmp_path: Path) -> None:
    """Bytes of a real file at random places: whatever comes of it is weights or one line."""
    import random

    buffer = io.BytesIO()
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(lr=1)}, buffer)
    with zipfile.ZipFile(buffer) as source:
        name = next(n for n in source.namelist() if n.endswith("data.pkl"))
        good, rest = source.read(name), {n: source.read(n) for n in source.namelist() if n != name}
    draw = random.Random(0)
    for _ in range(300):
        content = bytearray(good)
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path = tmp_path / "x.pth"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
            target.writestr(name, bytes(content))
            for other, data in rest.items():
                target.writestr(other, data)
        try:
            open_checkpoint(path)
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017


# ------------------------------------------------------------------------------------------- containers


def test_the_tar_format_of_old_is_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for mode in ("w", "w:gz"):
        with tarfile.open(tmp_path / "evil.tar", mode) as target:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                content = pickle.dumps(run(canary))
                info = tarfile.TarInfo(name)
                info.size = len(content)
                target.addfile(info, io.BytesIO(content))
        text = check(tmp_path / "evil.tar", canary)
        assert "archive" in text


def test_a_zip_bomb_is_not_inflated(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("bomb/data.pkl", pickle.dumps({}, protocol=2))
        target.writestr("bomb/data/0", b"\0" * 50_000_000)
    assert path.stat().st_size < 200_000
    assert "compressed records" in check(path, tmp_path / "canary")


def test_records_that_overlap_are_refused(tmp_path: Path) -> None:
    """A quine-like archive: many entries of the directory point at the same bytes."""
    path = tmp_path / "overlap.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        target.writestr("x/data.pkl", pickle.dumps({}, protocol=2))
        target.writestr("x/data/0", b"\0" * 100_000)
        first = target.infolist()[1]
        for i in range(1, 50):
            twin = zipfile.ZipInfo(f"x/data/{i}")
            twin.header_offset, twin.file_size, twin.compress_size = first.header_offset, 100_000, 100_000
            twin.CRC = first.CRC
            target.filelist.append(twin)
            target.NameToInfo[twin.filename] = twin
        target._didModify = True  # type: ignore[attr-defined]
    assert "more bytes than it has" in check(path, tmp_path / "canary")


def test_another_byte_order_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path) as source:
        records = {r.filename: source.read(r) for r in source.infolist()}
    for order in ("big", "nonsense"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
            for name, data in records.items():
                target.writestr(name, order.encode() if name.endswith("byteorder") else data)
        assert "byte order is not little-endian" in check(path, tmp_path / "canary")
