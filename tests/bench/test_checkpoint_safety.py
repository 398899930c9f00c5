"""Files that are no checkpoints, damaged ones, and pickles that would run code: one clear line each."""

from __future__ import annotations

import argparse
import datetime
import io
import os
import pathlib
import pickle
import random
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lmim_bench.bench.checkpoints import open_checkpoint
from lmim_bench.bench.checkpoints.pickles import is_harmless
from lmim_bench.bench.errors import CheckpointError

WEIGHTS = {"a.weight": torch.arange(600.0).reshape(20, 30), "b": torch.ones(3)}


def refuse(path: Path, words: str) -> str:
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text
    return text


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.pth"
    torch.save({"model": WEIGHTS, "epoch": 3}, path)
    return path


# ------------------------------------------------------------------------------------------- good files


def test_what_is_read_is_what_was_written(good: Path) -> None:
    import hashlib

    container = open_checkpoint(good)
    assert container.format == "torch"
    assert container.sha256 == hashlib.sha256(good.read_bytes()).hexdigest()
    assert container.payload["epoch"] == 3
    for name, tensor in WEIGHTS.items():
        assert torch.equal(container.payload["model"][name], tensor)
    assert container.notes == ()


def test_safetensors_whatever_the_file_is_called(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "weights.pth")
    container = open_checkpoint(tmp_path / "weights.pth")
    assert container.format == "safetensors"
    assert torch.equal(container.payload["a.weight"], WEIGHTS["a.weight"])


def test_the_format_before_zip_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(
        {"model": WEIGHTS, "args": argparse.Namespace(lr=1)}, path, _use_new_zipfile_serialization=False
    )
    container = open_checkpoint(path)
    assert torch.equal(container.payload["model"]["b"], WEIGHTS["b"])
    assert container.notes == ("metadata read through inert stand-ins: argparse.Namespace",)


# ------------------------------------------------------------------------------------------- not a checkpoint


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
            "git-LFS.*git lfs pull",
        ),
        (b"<!DOCTYPE html><html><head><title>404</title></head></html>", "web page"),
        (b"\n <html>", "web page"),
        (b"epoch: 3\nloss: 0.1\n", "text file"),
        (b"\x1f\x8b\x08" + b"\0" * 30, "compressed archive"),
        (b"\0" * 257 + b"ustar" + b"\0" * 300, "tar archive"),
        (bytes(range(255, 0, -1)), "neither a safetensors nor a torch checkpoint"),
        (b"PK\x03\x04" + b"\0" * 60, "truncated or damaged"),
        (b"\x80\x02", "cannot be read|not a torch checkpoint|truncated"),
        ((1 << 40).to_bytes(8, "little") + b'{"a":', "truncated safetensors"),
        ((8).to_bytes(8, "little") + b'{"a": 1 ', "damaged safetensors"),
    ],
)
def test_files_that_are_no_checkpoints(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    refuse(path, words)


def test_nothing_and_a_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "none.pth", "there is no checkpoint file")
    refuse(tmp_path / "no" / "none.pth", "there is no folder")
    (tmp_path / "folder").mkdir()
    refuse(tmp_path / "folder", "holds no file of weights")
    (tmp_path / "model_best.pth").write_bytes(b"x")
    refuse(tmp_path / "model_bst.pth", r"there is no checkpoint file .*; near: model_best\.pth")
    (tmp_path / "last.pth").symlink_to("epoch_300.pth")
    refuse(tmp_path / "last.pth", r"last\.pth is a link that leads nowhere: to epoch_300\.pth$")


def test_archives_of_another_kind(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    refuse(tmp_path / "x.npz", "NumPy archive")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refuse(tmp_path / "x.zip", r"no data\.pkl")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    refuse(tmp_path / "tensor.pth", "holds a Tensor, not a dict")


def test_torchscript_holds_code(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"script/{name}", "x")
    refuse(tmp_path / "script.pt", "TorchScript")


# ------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file(good: Path, share: float) -> None:
    content = good.read_bytes()
    good.write_bytes(content[: int(share * len(content))])
    refuse(good, "truncated or damaged")


@pytest.mark.parametrize("kind", ["x.safetensors", "old.pth"])
def test_a_file_whose_end_was_never_written(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    matrix = torch.randn(64, 64)

    def save(**weights: torch.Tensor) -> None:
        if kind == "old.pth":
            torch.save(weights, path, _use_new_zipfile_serialization=False)
        else:
            save_file(weights, path)

    save(weight=matrix)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4096] + bytes(4096))
    refuse(path, "ends in zeros in the midst of weight; the download or the copy did not finish")
    # What may well be zeros: biases, tables, heads before their first step, a dead filter elsewhere.
    for name in ("y.bias", "y.weight", "pos_embed"):
        save(**{"a.weight": matrix, name: torch.zeros(64, 64) if "bias" not in name else torch.zeros(4096)})
        open_checkpoint(path)
    dead = matrix.clone()
    dead[-8:] = 0
    save(**{"a.weight": dead, "y.bias": torch.randn(4096)})
    open_checkpoint(path)


def test_a_truncated_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-100])
    refuse(path, "damaged safetensors")


def test_one_flipped_bit_in_a_weight(good: Path) -> None:
    content = bytearray(good.read_bytes())
    where = content.find(np.arange(600, dtype=np.float32)[300:310].tobytes())
    content[where] ^= 1
    good.write_bytes(content)
    torch.load(good, weights_only=True)  # torch itself sees nothing
    refuse(good, "fails its checksum")


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(open_checkpoint(tmp_path / "x.pth").payload["b"], WEIGHTS["b"])


def test_a_repacked_archive_that_inflates(good: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    refuse(packed, "compressed records")


@settings(
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    content=st.binary(max_size=400),
    start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x93"]),
)
def test_any_bytes_end_in_one_line(content: bytes, start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any.pth"
    path.write_bytes(start + content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- pickles


class Payload:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def attacks(mark: Path) -> dict[str, Any]:
    """Calls that would leave a mark on the disk."""
    touch = f"open({str(mark)!r}, 'w').close()"
    return {
        "posix.system": Payload(os.system, f"touch {mark}"),
        "builtins.eval": Payload(eval, f"__import__('pathlib').Path({str(mark)!r}).touch()"),
        "builtins.exec": Payload(exec, touch),
        "pathlib.Path.touch": Payload(pathlib.Path.touch, mark),
        "io.open": Payload(io.open, str(mark), "w"),
    }


@pytest.mark.parametrize(
    "name", ["posix.system", "builtins.eval", "builtins.exec", "pathlib.Path.touch", "io.open"]
)
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("company", [False, True])
def test_a_payload_does_not_run(name: str, old: bool, company: bool, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    extra = {"args": argparse.Namespace(a=np.float64(1))} if company else {}
    payload = {"model": WEIGHTS, **extra, "evil": attacks(mark)[name]}
    torch.save(payload, tmp_path / "x.pth", _use_new_zipfile_serialization=not old)
    text = refuse(tmp_path / "x.pth", "is refused: its pickle names")
    assert not mark.exists()
    assert "safetensors" in text


def test_the_payloads_of_these_tests_do_run_in_a_plain_pickle(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(attacks(mark)["builtins.eval"]))
    assert mark.exists()


def test_the_environment_cannot_switch_safety_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"evil": attacks(tmp_path / "mark")["builtins.eval"]}, tmp_path / "x.pth")
    refuse(tmp_path / "x.pth", "builtins.eval")
    assert not (tmp_path / "mark").exists()


def test_a_whole_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "x.pth")
    refuse(tmp_path / "x.pth", r"names torch\.nn\.modules\.linear\.Linear.*convert the weights")


def test_a_plain_pickle_is_no_checkpoint(tmp_path: Path) -> None:
    for protocol in (2, 4):
        path = tmp_path / f"p{protocol}.pkl"
        path.write_bytes(pickle.dumps({"w": [1, 2]}, protocol=protocol))
        refuse(path, "p[24].pkl")


def fake_class(patch: pytest.MonkeyPatch, module: str, name: str, base: type = object) -> type:
    """A class that pickles under a name of a package which is not installed."""
    made = type(name, (base,), {"__module__": module, "__qualname__": name})
    package = types.ModuleType(module)
    setattr(package, name, made)
    patch.setitem(sys.modules, module.split(".")[0], types.ModuleType(module.split(".")[0]))
    patch.setitem(sys.modules, module, package)
    return made


def test_harmless_metadata_is_read_and_noted(tmp_path: Path) -> None:
    state = np.random.RandomState(0).get_state()
    metadata = {
        "args": argparse.Namespace(lr=1e-3, out=Path("a"), windows=pathlib.PureWindowsPath("b"), nested=[1]),
        "best_acc": np.float32(0.5),
        "best_epoch": np.int64(3),
        "curve": np.arange(3.0),
        "random": (state, random.Random(0).getstate()),
        "counts": defaultdict(int, a=1),
        "order": OrderedDict(a=1),
        "types": [int, float, str, dict, list],
        "version": torch.torch_version.TorchVersion("2.1"),
        "losses": deque([0.3, 0.2], maxlen=9),
        "window": [slice(1, 2), frozenset([1]), range(3)],
        "when": [datetime.date(2026, 1, 2), datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)],
    }
    torch.save({"model": WEIGHTS, **metadata}, tmp_path / "x.pth")
    container = open_checkpoint(tmp_path / "x.pth")
    assert torch.equal(container.payload["model"]["a.weight"], WEIGHTS["a.weight"])
    assert "argparse.Namespace" in container.notes[0]
    # Nothing of the metadata is a real object: no class but the stand-ins was built.
    assert not isinstance(container.payload["args"], argparse.Namespace)
    assert not isinstance(container.payload["curve"], np.ndarray)


def test_metadata_of_packages_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        config = fake_class(patch, "omegaconf.dictconfig", "DictConfig")()
        config.__dict__["_content"] = {"lr": 1}
        node = fake_class(patch, "yacs.config", "CfgNode", dict)(a=1, b={"c": 2})
        history = fake_class(patch, "mmengine.logging.history_buffer", "HistoryBuffer")()
        history.__dict__["_log_history"] = np.arange(3.0)
        hub = {"message_hub": {"log_scalars": OrderedDict(loss=history)}}
        torch.save({"model": WEIGHTS, "cfg": config, "config": node, **hub}, tmp_path / "x.pth")
    assert "yacs" not in sys.modules
    container = open_checkpoint(tmp_path / "x.pth")
    assert torch.equal(container.payload["model"]["b"], WEIGHTS["b"])
    (note,) = container.notes
    assert note.startswith(
        "metadata read through inert stand-ins: mmengine.logging.history_buffer.HistoryBuffer"
    )
    assert note.endswith("omegaconf.dictconfig.DictConfig, yacs.config.CfgNode")
    assert "yacs.config" not in sys.modules


def test_numpy_under_its_old_name(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": WEIGHTS, "best": np.float64(0.5)}, path)
    with zipfile.ZipFile(path) as source:
        records = {r.filename: source.read(r) for r in source.infolist()}
    records["x/data.pkl"] = records["x/data.pkl"].replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in records["x/data.pkl"]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name, content in records.items():
            target.writestr(name, content)
    assert "numpy.core.multiarray.scalar" in open_checkpoint(path).notes[0]


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "builtins.getattr",
        "builtins.__import__",
        "os.system",
        "posix.system",
        "subprocess.Popen",
        "argparse.ArgumentParser",
        "pathlib.Path.touch",
        "pathlib.os.system",
        "numpy.load",
        "numpy.core.multiarray.fromfile",
        "numpy.f2py.compile",
        "omegaconf_evil.run",
        "xomegaconf.dictconfig.DictConfig",
        "functools.partial",
        "operator.attrgetter",
        "torch.load",
        "torch.hub.load",
    ],
)
def test_no_function_is_on_the_list(name: str) -> None:
    assert not is_harmless(name)


def test_a_stand_in_keeps_nothing_global(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(a=1)}, tmp_path / "x.pth")
    before = set(torch.serialization.get_safe_globals())
    open_checkpoint(tmp_path / "x.pth")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pth", weights_only=True)
