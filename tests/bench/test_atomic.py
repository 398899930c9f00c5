"""Files that are there whole or not at all."""

import errno
import os

import pytest
import torch
from safetensors.torch import save

from lmim_bench.bench.atomic import atomic_write, remove_unfinished, write_json
from lmim_bench.bench.errors import said_by_the_system


class Full:
    """A stream to a disk that is full after so many bytes."""

    def __init__(self, stream, room, number=errno.ENOSPC):
        self.stream, self.room, self.number = stream, room, number

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(self.number, os.strerror(self.number))
        return self.stream.write(data)

    def flush(self):
        self.stream.flush()


@pytest.mark.parametrize("room", [0, 1000, 30_000])
@pytest.mark.parametrize("write", [lambda t, s: torch.save(t, s), lambda t, s: s.write(save(t))])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_or_file_is_told_as_such_and_leaves_what_was_there(tmp_path, write, room, number):
    path = tmp_path / "encoder.pth"
    path.write_bytes(b"before")
    with (
        pytest.raises(OSError, match=os.strerror(number)) as caught,
        atomic_write(path, "wb") as stream,
    ):
        write({"x": torch.zeros(10_000)}, Full(stream, room, number))
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.pth"]
    assert path.read_bytes() == b"before"


def test_what_the_system_says_of_no_file_is_said_of_this_one(tmp_path):
    path = tmp_path / "features.npy"
    with (
        pytest.raises(OSError, match="File too large") as caught,
        atomic_write(path, "wb"),
    ):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))  # as a write does past ulimit -f
    assert caught.value.filename == str(path)


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    kept = [tmp_path / name for name in ("step-1.pth", ".lock", ".mine.tmp", "x.0123abcd.tmp", ".x.0123abcd")]
    for path in kept:
        path.touch()
    stream = atomic_write(tmp_path / "step-2.pth", "wb")
    stream.__enter__()
    assert len(list(tmp_path.iterdir())) == len(kept) + 1
    remove_unfinished(tmp_path)
    remove_unfinished(tmp_path / "nowhere")
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_that_is_being_handled_is_no_reason_of_another_error(tmp_path):
    def write():
        with atomic_write(tmp_path / "out.txt") as stream:
            stream.write("half")
            raise ValueError("of our own")

    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with pytest.raises(ValueError, match="of our own"):
            write()
    assert not list(tmp_path.iterdir())


def test_what_may_not_be_written_is_told_by_the_name_that_was_given(tmp_path, monkeypatch):
    def forbidden(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), "open", forbidden)
    with pytest.raises(PermissionError) as caught, atomic_write(tmp_path / "table.md"):
        pass
    assert caught.value.filename == str(tmp_path / "table.md")
    said = said_by_the_system(caught.value)
    mend = "where it is to be written, give another --out or --cache-dir"
    assert said == f"{tmp_path / 'table.md'}: Permission denied; {mend}"
    assert said_by_the_system(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
