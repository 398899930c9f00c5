"""A run as a user sees it: cells kept and added, what is reused, what is written."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lmim_bench.bench import encoders, records
from lmim_bench.bench.api import run
from lmim_bench.bench.checkpoints import save_checkpoint
from lmim_bench.bench.engine import Engine
from lmim_bench.bench.errors import ConfigError
from lmim_bench.bench.vit import build_vit, vit_spec


@pytest.fixture
def encoded(monkeypatch):
    """Counts the images that pass through an encoder."""
    counts = {"images": 0}
    original = Engine.launch

    def counting(self, images, *args):
        counts["images"] += len(images)
        return original(self, images, *args)

    monkeypatch.setattr(Engine, "launch", counting)
    return counts


def test_each_image_is_encoded_once_whatever_number_of_tasks_need_it(checkpoint, options, encoded):
    finished = run(checkpoint, **{**options, "tasks": ["knn", "linear", "few_shot"]})
    assert [r.status for r in finished.results] == ["ok"] * 3
    assert encoded["images"] == 36 + 24
    assert (options["out"] / "report.html").stat().st_size > 1000


def test_a_second_run_keeps_the_cells_and_one_more_checkpoint_adds_its_own(
    values, save_tiny, checkpoint, options, encoded, tmp_path
):
    first = run(checkpoint, **options)
    stamps = {p.name: p.stat().st_mtime_ns for p in (options["out"] / "results").glob("*.json")}
    encoded["images"] = 0
    assert values(run(checkpoint, **options)) == values(first)
    assert encoded["images"] == 0
    other = save_tiny(tmp_path / "two.pth", seed=2)
    both = run([checkpoint, other], **options)
    assert encoded["images"] == 60
    assert {r.checkpoint.label for r in both.results} == {"one", "two"}
    for name, stamp in stamps.items():
        assert (options["out"] / "results" / name).stat().st_mtime_ns == stamp


def test_what_was_scored_is_not_opened_again_until_its_file_changes(
    save_tiny, checkpoint, options, monkeypatch, tmp_path
):
    run(checkpoint, **options)
    opened = []
    original = encoders.load_encoder

    def counting(reference, **kwargs):
        opened.append(reference)
        return original(reference, **kwargs)

    monkeypatch.setattr(encoders, "load_encoder", counting)
    run(checkpoint, **options)
    assert opened == []
    page = (options["out"] / "report.html").stat().st_mtime_ns
    run([checkpoint], **{**options, "seeds": (0,)})
    assert (options["out"] / "report.html").stat().st_mtime_ns == page, "the same results keep their page"
    save_tiny(checkpoint, seed=5)
    with pytest.raises(ConfigError, match="other weights under the same label"):
        run(checkpoint, **options)
    assert opened == [str(checkpoint)]


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "processor_config.json"])
def test_what_lies_beside_a_file_and_decides_what_is_loaded_is_looked_at(
    checkpoint, tmp_path, monkeypatch, name
):
    (tmp_path / name).write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    record = records.checkpoint_record("a", str(checkpoint), tmp_path / "cache")
    (tmp_path / name).write_text('{"image_mean": [0, 0, 0]}')
    monkeypatch.setattr(encoders, "load_encoder", lambda *_: pytest.fail("opened"))
    with pytest.raises(pytest.fail.Exception, match="opened"):
        records.checkpoint_record("a", str(checkpoint), tmp_path / "cache")
    assert record.label == "a"


@pytest.mark.parametrize("damaged", [b"", b"{", b"{}"])
def test_a_damaged_record_of_a_checkpoint_is_made_again(values, checkpoint, options, damaged):
    first = run(checkpoint, **options)
    (kept,) = (options["cache_dir"] / "records").glob("*.json")
    whole = kept.read_bytes()
    kept.write_bytes(damaged)
    assert values(run(checkpoint, **options)) == values(first)
    assert kept.read_bytes() == whole


def test_a_record_that_cannot_be_kept_does_not_stop_the_run(checkpoint, options, monkeypatch):
    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(records, "write_json", forbidden)
    assert run(checkpoint, **options).results[0].status == "ok"


@pytest.mark.parametrize("reference", ["random:{}", "timm:test_vit"])
def test_random_weights_are_drawn_once(values, reference, checkpoint, options, monkeypatch):
    reference = reference.format(checkpoint)
    first = run(reference, **options)
    monkeypatch.setattr(encoders, "load_encoder", lambda *_: pytest.fail("it was opened again"))
    assert values(run(reference, **options)) == values(first)


def test_the_weights_that_are_scored_are_those_that_were_opened(save_tiny, checkpoint, options, monkeypatch):
    """A file that changes between the plan and its turn, with the very times that it had before."""
    run(checkpoint, **options)
    save_tiny(checkpoint, seed=5)
    record = next((options["cache_dir"] / "records").glob("*.json"))
    monkeypatch.setattr(records, "_state", lambda *_: record.stem)
    found = run(checkpoint, **{**options, "tasks": ["linear"]})
    assert [r.status for r in found.results] == ["ok", "failed"]
    assert "other weights than when it was opened" in found.results[1].error


def test_another_task_reuses_the_bank(checkpoint, options, encoded):
    run(checkpoint, **{**options, "tasks": ["linear"]})
    before = encoded["images"]
    finished = run(checkpoint, **{**options, "tasks": ["linear", "few_shot"]})
    assert encoded["images"] == before
    assert len(finished.results) == 2


def test_a_further_seed_adds_cells(checkpoint, options):
    options["tasks"] = ["few_shot"]
    run(checkpoint, **options)
    finished = run(checkpoint, **{**options, "seeds": (0, 1)})
    assert [r.seed for r in finished.results] == [0, 1]
    assert finished.results[0].scores != finished.results[1].scores


def test_the_same_seed_gives_the_same_numbers(values, checkpoint, options, tmp_path):
    options["tasks"] = ["knn", "linear", "few_shot"]
    first = run(checkpoint, **options)
    again = run(checkpoint, **{**options, "out": tmp_path / "b", "cache_dir": tmp_path / "cache-b"})
    assert values(first) == values(again)
    alone = run(checkpoint, **{**options, "tasks": ["few_shot"], "out": tmp_path / "c"})
    assert values(alone).items() <= values(first).items()


def test_a_limited_run_says_so_everywhere(checkpoint, options):
    finished = run(checkpoint, **options, limit=6)
    assert finished.limited
    assert finished.results[0].limit == 6
    assert finished.results[0].data.counts == {"train": 6, "val": 6}
    assert "limited" in (options["out"] / "report.html").read_text(encoding="utf-8").lower()


def test_cells_keep_their_place_and_a_plan_of_all_of_them_gives_a_new_one(
    save_tiny, checkpoint, options, tmp_path
):
    other = save_tiny(tmp_path / "two.pth", seed=2)
    run(checkpoint, **options)
    added = run(other, **options)
    assert [r.checkpoint.label for r in added.results] == ["one", "two"]
    again = run(checkpoint, **{**options, "tasks": ["few_shot"]})
    assert [(r.checkpoint.label, r.task) for r in again.results] == [
        ("one", "knn"),
        ("two", "knn"),
        ("one", "few_shot"),
    ]
    both = run([other, checkpoint], **{**options, "tasks": ["few_shot", "knn"]})
    assert [r.checkpoint.label for r in both.results] == ["two", "two", "one", "one"]


def test_a_run_of_which_all_is_scored_does_without_torch(checkpoint, options):
    options["device"] = "auto"
    run(checkpoint, **options)
    given = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    code = (
        "import sys, json; from lmim_bench.bench.api import run; "
        f"run({str(checkpoint)!r}, **json.loads({json.dumps(given)!r})); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr
    assert "1 of 1 cells are already scored" in done.stderr


def test_a_factory_in_the_working_folder_with_random_weights_is_the_same_twice(
    options, tmp_path, monkeypatch
):
    (tmp_path / "my_net.py").write_text(
        "import timm\n"
        "def make():\n"
        "    return timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=0)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    finished = run("python:my_net:make", **options)
    assert finished.results[0].status == "ok"


FACTORIES = """
import torch

class Net(torch.nn.Module):
    embed_dim, patch_size = 3, 16
    def __init__(self, factor):
        super().__init__()
        self.factor = factor
    def forward_features(self, images):
        return self.factor * torch.nn.functional.avg_pool2d(images, 16)

def one():
    return Net(1.0)

def nothing():
    return Net(0.0)
"""


def test_factories_are_told_apart_by_name_and_code_where_their_weights_are_equal(
    options, tmp_path, monkeypatch
):
    (tmp_path / "my_nets.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    score = {}
    for factory in ("one", "nothing"):
        (result,) = run(f"python:my_nets:{factory}", **{**options, "out": tmp_path / factory}).results
        score[factory] = result.score(result.headline).value
    assert score["one"] > 0.6
    assert score["nothing"] == pytest.approx(1 / 3)
    first = encoders.load_encoder("python:my_nets:one").fingerprint
    (tmp_path / "my_nets.py").write_text(FACTORIES.replace("16)", "16) ** 3"))
    assert encoders.load_encoder("python:my_nets:one").fingerprint != first


def test_items_are_kept_beside_the_scores(checkpoint, options):
    finished = run(checkpoint, **options)
    (result,) = finished.results
    items = np.load(options["out"] / "items" / f"{result.cell}.npz")
    head = result.score(result.headline)
    assert items[result.headline].mean() == pytest.approx(head.value)
    assert head.low <= head.value <= head.high
    assert head.n == 24


def test_results_file_is_valid_json_without_nan(checkpoint, options):
    run(checkpoint, **options)
    text = (options["out"] / "results.json").read_text(encoding="utf-8")
    payload = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert payload["schema_version"] == "lmim-bench/results/1"
    assert payload["results"][0]["environment"]["packages"]["torch"]


def test_the_cache_is_bounded_and_evicts_what_was_used_longest_ago(save_tiny, checkpoint, options, tmp_path):
    run(checkpoint, **options)
    banks = options["cache_dir"] / "features"
    old = {p.name for p in banks.iterdir()}
    other = save_tiny(tmp_path / "two.pth", seed=2)
    run(other, **{**options, "out": tmp_path / "b"}, cache_size_gb=1e-9)
    left = {p.name for p in banks.iterdir()}
    assert len(left) == 1
    assert not left & old


def test_a_run_says_at_its_start_what_is_doubtful_in_a_checkpoint(tmp_path, options, capsys):
    spec = vit_spec("lmim-bench", embed_dim=24, depth=2, num_heads=2, patch_size=8, image_size=32)
    note = "WARNING: the representations have collapsed"
    save_checkpoint(tmp_path / "x.pth", spec, build_vit(spec.arch).state_dict(), {"notes": [note]})
    run(tmp_path / "x.pth", **{**options, "tasks": "knn"})
    said = " ".join(capsys.readouterr().err.split())
    assert said.index(f"x: {note}") < said.index("scoring 1 cells")
