"""The registry: what every task declares, and tasks that come from other packages."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lmim_bench.bench.errors import ConfigError
from lmim_bench.tasks import get_task, registry

REPO = Path(__file__).parents[2]
GUIDE = (REPO / "docs" / "adding-a-task.md").read_text(encoding="utf-8")
TASKS = sorted(registry()[0])


@pytest.mark.parametrize("name", TASKS)
def test_every_task_declares_itself_completely(name):
    spec = get_task(name)
    config = spec.config()
    assert spec.version >= 1
    assert len(spec.doc) > 100
    assert spec.config.model_validate(json.loads(config.model_dump_json())) == config
    for field, info in spec.config.model_fields.items():
        assert info.description, f"{name}.{field} has no description"
    assert spec.metric(spec.headline(config)).title
    with pytest.raises(KeyError):
        spec.metric("nothing@k=1")


def test_the_built_in_tasks_are_there():
    assert set(TASKS) >= {"knn", "linear", "unsup_seg", "vos", "few_shot", "diagnose", "hidden_patches"}


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'few_shot'"):
        get_task("few_shots")


def install(site: Path, name: str, module: str, entry_points: str) -> None:
    """What pip leaves behind for a package with one module."""
    site.mkdir(exist_ok=True)
    (site / f"{name.replace('-', '_')}_module.py").write_text(module, encoding="utf-8")
    info = site / f"{name.replace('-', '_')}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[lmim_bench.tasks]\n{entry_points}\n", encoding="utf-8")


def lmim_bench(site: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lmim_bench", *args],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=site,
    )


def guide_task() -> str:
    (code,) = [b for b in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "@task(" in b]
    return code


def test_the_task_of_the_guide_runs_as_a_plug_in(tmp_path):
    site = tmp_path / "site"
    install(site, "colour-task", guide_task(), "colour = colour_task_module:TASK")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        folder = tmp_path / "images" / split / "only"
        folder.mkdir(parents=True)
        for i in range(12):
            pixels = np.broadcast_to(rng.integers(0, 255, 3), (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    listed = lmim_bench(site, "tasks")
    assert re.search(r"^ ?colour .*colour-task 1\.5", listed.stdout, re.MULTILINE), listed.stdout
    done = lmim_bench(
        *(site, "run", "--ckpt", "pixels", "--tasks", "colour", "--data", str(tmp_path / "images")),
        *("--out", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache"), "--device", "cpu"),
        *("--set", "colour.ridge=0.01"),
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["results"]
    assert result["task_origin"] == "colour-task 1.5"
    (score,) = result["scores"]
    assert 0 <= score["low"] <= score["value"] <= score["high"] < 3  # grey levels, of 255


def test_a_broken_plug_in_is_reported_by_name_and_the_others_stay(tmp_path):
    install(tmp_path / "site", "bad-task", "raise RuntimeError('half written')", "bad = bad_task_module:TASK")
    done = lmim_bench(tmp_path / "site", "tasks")
    assert done.returncode == 0
    assert "knn" in done.stdout
    assert "bad: could not be loaded: bad-task 1.5: RuntimeError: half written" in done.stderr
    asked = lmim_bench(tmp_path / "site", "describe", "bad")
    assert asked.returncode == 2
    assert "half written" in asked.stderr


def test_something_that_is_no_task_is_reported(tmp_path):
    install(tmp_path / "site", "odd-task", "TASK = 3", "odd = odd_task_module:TASK")
    assert "is not a task" in lmim_bench(tmp_path / "site", "tasks").stderr


def test_two_tasks_of_one_name_are_an_error_that_names_both(tmp_path):
    clash = "from lmim_bench.tasks import get_task\nfrom lmim_bench.tasks.knn import TASK\n"
    install(tmp_path / "site", "my-knn", clash, "knn = my_knn_module:TASK")
    done = lmim_bench(tmp_path / "site", "tasks")
    assert done.returncode == 2
    assert "my-knn 1.5" in done.stderr
    assert "lmim-bench" in done.stderr
