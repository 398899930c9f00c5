"""The cache folder: half-written folders of others stay, and clearing deletes what this program made."""

import os
import re
import time

import pytest
from click.testing import CliRunner

from lmim_bench.bench.cache import PARTS, clear, clear_stale, staging, usage
from lmim_bench.bench.cli import cli

DEAD = 999_999_999
DAY = 86_400


def renamed(half, host=None, pid=None):
    """The folder as a process of that number, or on that host, would have named it."""
    *name, old_host, old_pid, random, suffix = half.name.split(".")
    return half.rename(
        half.with_name(".".join([*name, host or old_host, str(pid or old_pid), random, suffix]))
    )


def age(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def test_staging_makes_folders_of_different_names_beside_the_final_one(tmp_path):
    first, second = (staging(tmp_path / "deep" / "v1.2") for _ in range(2))
    assert first != second
    assert first.parent == second.parent == tmp_path / "deep"
    assert first.name.startswith(".v1.2.")
    assert list(first.iterdir()) == []
    (tmp_path / "plain").mkdir()
    assert first.stat().st_mode == (tmp_path / "plain").stat().st_mode, (
        "others may read it once it is renamed"
    )


def test_of_this_host_the_folders_of_dead_processes_go(tmp_path):
    alive, dead = staging(tmp_path / "a"), renamed(staging(tmp_path / "a"), pid=DEAD)
    clear_stale(tmp_path)
    assert alive.is_dir()
    assert not dead.exists()


def test_of_other_hosts_the_folders_go_that_were_not_written_to_for_a_day(tmp_path):
    """The number of a process on another host says nothing here; a file that grows shows that it lives."""
    fresh, silent, growing = (renamed(staging(tmp_path / n), host="other", pid=DEAD) for n in "abc")
    for half in (silent, growing):
        (half / "rows.npy").write_bytes(b"0")
        age(half / "rows.npy", 2 * DAY)
        age(half, 2 * DAY)
    age(growing / "rows.npy", 60)
    clear_stale(tmp_path)
    assert fresh.is_dir()
    assert growing.is_dir()
    assert not silent.exists()


def test_what_staging_did_not_name_is_no_half_written_folder(tmp_path):
    for name in (".somebody.else.tmp", f".a.host.{DEAD}.tmp", ".tmp"):
        (tmp_path / name).mkdir()
        age(tmp_path / name, 9 * DAY)
    clear_stale(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


KEY = "0123456789abcdef" * 2
MADE = {
    "features": f"{KEY}/index.npy",
    "manifests": f"{KEY}-contents-2.json",
    "pixels": f"{KEY}/pixels.npy",
    "records": f"{KEY}.json",
    "scenes-v1": "scenes-seg/classes.txt",
    "scenes-v12": "complete.json",
    "torchvision": "dtd.tar.gz",
}


@pytest.fixture
def root(tmp_path):
    for part, name in MADE.items():
        (tmp_path / part / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / part / name).write_bytes(b"12345")
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "me.jpg").write_bytes(b"1")
    (tmp_path / "scenes-views").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    return tmp_path


FOREIGN = ("notes.txt", "photographs", "scenes-views")


def test_clear_leaves_and_names_what_is_not_of_this_program_and_what_was_downloaded(root):
    freed, left = clear(root)
    assert freed == 6 * 5
    assert left == (*FOREIGN, "torchvision")
    assert tuple(sorted(path.name for path in root.iterdir())) == left
    assert (root / "photographs" / "me.jpg").is_file()


def test_clear_of_one_part_leaves_the_others(root):
    assert clear(root, "scenes").freed == 2 * 5
    assert clear(root, "torchvision").freed == 5
    left = {path.name for path in root.iterdir()}
    assert left == {"features", "manifests", "pixels", "records", *FOREIGN}
    for part in PARTS:
        clear(root, part)
    assert tuple(sorted(path.name for path in root.iterdir())) == FOREIGN


def test_clear_leaves_and_names_what_others_keep_in_the_folder_of_a_part(root):
    """A cache folder may be a project of the user's, with features and records of its own."""
    mine = ["features/thesis.npy", "records/patients.csv", f"pixels/{KEY}.tar", "scenes-v1/photographs"]
    for name in mine:
        (root / name).write_text("mine")
    assert clear(root).left == tuple(sorted([*FOREIGN, *mine, "torchvision"]))
    for i in range(5):
        (root / "records" / f"{i}.csv").write_text("mine")
    freed, left = clear(root)
    assert freed == 0
    assert [name for name in left if "records" in name] == [
        *(f"records/{i}.csv" for i in range(3)),
        "3 more in records/",
    ]
    assert all((root / name).read_text() == "mine" for name in mine)


def test_clear_takes_what_an_earlier_version_and_a_killed_run_left(root):
    for name in (".lock", f".{KEY}.lock", f".{KEY}-broken.json.lock", f"{KEY}-broken.json"):
        (root / "pixels" / name).touch()
    renamed(staging(root / "features" / KEY), pid=DEAD)
    (root / "records" / f".{KEY}.json.0a1b2c3d.tmp").touch()
    assert clear(root).left == (*FOREIGN, "torchvision")


def test_clear_leaves_and_names_what_another_process_is_writing(root):
    alive = staging(root / "features" / KEY)
    elsewhere = renamed(staging(root / "features" / KEY), host="other", pid=DEAD)
    left = {alive.relative_to(root).as_posix(), elsewhere.relative_to(root).as_posix()}
    assert set(clear(root).left) == {*FOREIGN, "torchvision", *left}
    assert alive.is_dir()
    age(elsewhere, 2 * DAY)
    assert set(clear(root).left) == {*FOREIGN, "torchvision", alive.relative_to(root).as_posix()}


def test_a_part_on_another_disk_is_emptied_and_its_link_stays(root, tmp_path_factory):
    disk, photographs = tmp_path_factory.mktemp("disk"), root / "photographs"
    (root / "features").rename(disk / "features")
    (root / "features").symlink_to(disk / "features")
    (disk / "features" / KEY[::-1]).symlink_to(photographs)
    freed, left = clear(root)
    assert freed == 6 * 5 + len(str(photographs))
    assert left == (*FOREIGN, "torchvision"), "the link is ours: there is nothing to say of it"
    assert (root / "features").is_symlink()
    assert list((disk / "features").iterdir()) == []
    assert (photographs / "me.jpg").is_file()


def test_what_is_shown_has_the_name_by_which_it_is_cleared(root):
    shown = usage(root)
    assert "scenes" in shown
    assert not any(re.fullmatch(r"scenes-v\d+", name) for name in shown)
    clear(root, "scenes")
    assert "scenes" not in usage(root)


def test_the_command_says_what_it_left(root):
    run = CliRunner().invoke(cli, ["cache", "--clear", "--cache-dir", str(root)])
    assert run.output.splitlines()[-1].startswith("left notes.txt, photographs, scenes-views, torchvision (")
    for part in PARTS:
        run = CliRunner().invoke(cli, ["cache", "--clear", part, "--cache-dir", str(root)])
        assert run.output.startswith("freed")
        assert len(run.output.splitlines()) == 1
