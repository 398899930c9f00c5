"""The doctor: every check where all is well and where it is not, and what the command makes of them."""

import json
import re
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from lmim_bench.bench import doctor_system
from lmim_bench.bench.api import make_config
from lmim_bench.bench.api import run as run_api
from lmim_bench.bench.cli import cli
from lmim_bench.bench.data import Detected, workers
from lmim_bench.bench.data.splits import ArraySplit
from lmim_bench.bench.doctor import _coverage, _Examination, examine
from lmim_bench.bench.doctor_data import data_checks
from lmim_bench.bench.doctor_system import Subject, device, packages, room, shared_memory
from lmim_bench.bench.errors import ConfigError
from lmim_bench.bench.progress import Reporter
from lmim_bench.bench.types import CheckpointInfo, Dataset


def picture(path, side=40, value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    pixels = rng.integers(0, 255, (side, side, 3)) if value is None else np.full((side, side), value)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def checkpoint(save_tiny, tmp_path):
    return save_tiny(tmp_path / "tiny.pth")


@pytest.fixture
def letters(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b", "c"):
            for i in range(6):
                picture(tmp_path / "letters" / split / name / f"{i}.png")
    return tmp_path / "letters"


@pytest.fixture
def roads(tmp_path):
    for split in ("train", "val"):
        for i in range(4):
            picture(tmp_path / "roads" / split / "images" / f"{i}.png")
            picture(tmp_path / "roads" / split / "masks" / f"{i}.png", value=i % 3)
    (tmp_path / "roads" / "classes.txt").write_text("road\nsky\ntree\n")
    return tmp_path / "roads"


@pytest.fixture
def clips(tmp_path):
    for i in range(4):
        picture(tmp_path / "clips" / "JPEGImages" / "480p" / "cat" / f"{i:05d}.png")
        picture(tmp_path / "clips" / "Annotations" / "480p" / "cat" / f"{i:05d}.png", value=1)
    return tmp_path / "clips"


@pytest.fixture
def look(tmp_path):
    """Examine, and return (status, found and mend) of the checks of an area and, where given, a name."""

    def call(area, ckpts, name=None, tasks=("all",), data=(), debug=False, **options):
        config = make_config(
            [str(c) for c in ckpts],
            tasks=list(tasks),
            data=[str(d) for d in data],
            device="cpu",
            out=tmp_path / "out",
            cache_dir=tmp_path / "cache",
            **options,
        )
        checks = examine(config, Reporter(), debug)
        assert {c.area for c in checks} >= {"system", "disk", "task", "checkpoint"}  # none stops the others
        assert all(bool(c.mend) == (c.status != "pass") for c in checks)
        return [
            (c.status, f"{c.found} -> {c.mend}") for c in checks if c.area == area and name in (None, c.name)
        ]

    return call


def only(checks, status):
    return [text for found, text in checks if found == status]


# --------------------------------------------------------------------------------------------- machine


def test_the_installed_packages_are_listed_with_their_versions():
    checks = {c.name: c for c in packages()}
    assert {"python", "torch", "timm", "faiss-cpu", "other packages"} <= set(checks)
    assert checks["torch"].status == "pass"
    assert torch.__version__.split("+")[0] in checks["torch"].found
    assert "numpy" in checks["other packages"].found


def pretend(monkeypatch, **versions):
    real = doctor_system.version

    def version(name):
        if name in versions and versions[name] is None:
            raise PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(doctor_system, "version", version)


def test_an_old_torch_and_a_missing_package_fail_with_the_command_that_mends_them(monkeypatch):
    pretend(monkeypatch, torch="2.9.1", pydantic=None)
    checks = {c.name: c for c in packages()}
    assert checks["torch"].status == "fail"
    assert checks["torch"].mend == 'pip install "torch>=2.10"'
    assert checks["pydantic"].status == "fail"
    assert "pydantic" not in checks["other packages"].found
    assert checks["timm"].status == "pass"


def test_faiss_under_another_name_is_found(monkeypatch):
    pretend(monkeypatch, **{"faiss-cpu": None})
    assert {c.name: c for c in packages()}["faiss-cpu"].status == "pass"


def test_an_unsupported_python_fails(monkeypatch):
    monkeypatch.setattr(doctor_system.platform, "python_version", lambda: "3.8.2")
    python = next(iter(packages()))
    assert python.status == "fail"
    assert "3.8.2" in python.found


def test_a_tree_that_is_not_installed_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor_system, "_DISTRIBUTION", "no-such-distribution-at-all")
    assert [c.status for c in packages()] == ["warn"]


def test_the_cpu_passes_and_says_its_threads():
    found = device("cpu")
    assert found.status in ("pass", "warn")
    assert f"{torch.get_num_threads()} threads" in found.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_passes_and_says_its_memory_and_whether_it_has_bf16():
    found = device("auto")
    assert found.found.startswith("cuda:0 (")
    assert "GB of memory free" in found.found
    assert "bf16" in found.found


def test_a_device_that_is_not_there_fails():
    found = device("cuda:99")
    assert found.status == "fail"
    assert "--device auto" in found.mend


def test_a_device_that_does_not_compute_fails(monkeypatch):
    monkeypatch.setattr(doctor_system, "resolve_device", lambda name: "meta")
    found = device("auto")
    assert found.status == "fail"
    assert "does not compute" in found.found


def test_little_memory_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor_system, "_free_memory", lambda where: 0.3)
    found = device("cpu")
    assert found.status == "warn"
    assert "0.3 GB" in found.found


def test_a_gpu_that_torch_cannot_use_is_a_warning(monkeypatch, tmp_path):
    (tmp_path / "version").touch()
    monkeypatch.setattr(doctor_system, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(doctor_system, "resolve_device", lambda name: "cpu")
    monkeypatch.setattr(doctor_system, "_free_memory", lambda where: None)
    assert device("auto").status == "warn"
    assert device("cpu").status == "pass"


@pytest.mark.parametrize(("free", "status"), [(64e6, "warn"), (8e9, "pass"), (None, "pass")])
def test_shared_memory_for_the_decoding_processes(monkeypatch, free, status):
    monkeypatch.setattr(workers, "shared_room", lambda: free)
    found = shared_memory(15)
    assert found.status == status
    if status == "warn":
        assert found.found == "0.06 GB free for 15 decoding processes, less than 2.15"
        assert "--shm-size" in found.mend


def test_room_on_the_disk(tmp_path):
    assert room("--out", tmp_path / "new" / "folder", 0.0, "results").status == "pass"
    short = room("--cache-dir", tmp_path, 1e9, "features")
    assert short.status == "warn"
    assert "--cache-dir" in short.mend
    (tmp_path / "file").touch()
    assert room("--out", tmp_path / "file" / "below", 0.0, "results").status == "fail"


def test_the_estimate_of_the_features_is_what_a_run_stores(checkpoint, letters, roads, tmp_path):
    config = make_config(
        {"tiny": checkpoint},
        tasks=["knn", "unsup_seg"],
        data=[str(letters), str(roads)],
        overrides={"unsup_seg": {"over_clusters": [], "seeds": 1, "nredo": 1, "size": 32}},
        device="cpu",
        out=tmp_path / "out",
        cache_dir=tmp_path / "cache",
    )
    examination = _Examination(config, Reporter(), debug=True)
    list(examination.checks())
    plan = examination._plan(*examination.sources)
    estimate = examination._feature_bytes(plan, examination.records["tiny"])
    run_api(config=config)
    columns = list((tmp_path / "cache" / "features").rglob("*@*.npy"))
    assert len(columns) == 4  # letters: cls of both splits and a raw mean of val; roads: patches of val
    assert estimate == sum(np.load(path).nbytes for path in columns)


# ------------------------------------------------------------------------------------------- data, tasks


def test_good_data_of_every_kind_pass_and_serve_their_tasks(look, checkpoint, letters, roads, clips):
    data = (letters, roads, clips)
    found = look("data", [checkpoint], data=data)
    assert {status for status, _ in found} == {"pass"}
    text = "\n".join(text for _, text in found)
    assert "imagefolder" in text
    assert "train 18, val 18 images, 3 classes" in text
    assert "36 images looked at, all whole" in text
    assert "labels 0 to 2 of 3 classes" in text
    assert "1 sequences, 4 frames" in text
    assert {status for status, _ in look("task", [checkpoint], data=data)} == {"pass"}


def test_the_data_of_a_suite_are_looked_at_each_by_itself(look, checkpoint, letters, roads, clips, tmp_path):
    suite = tmp_path / "ours.yaml"
    suite.write_text(
        "data: {abc: letters, street: {path: roads, void: [2]}, lost: {path: nowhere, kind: video}}\n"
        "tasks: {knn: {data: abc}, linear: {}, unsup_seg: {data: street, size: 32}, vos: {data: lost}}\n"
    )
    found = look("data", [checkpoint], suite=str(suite))
    assert "imagefolder" in look("data", [checkpoint], "abc", suite=str(suite))[0][1]
    assert "labels 0 to 1 of 3 classes" in look("data", [checkpoint], "street", suite=str(suite))[-1][1]
    assert [text for text in only(found, "fail") if "nowhere" not in text] == []
    tasks = {name: look("task", [checkpoint], name, suite=str(suite)) for name in ("knn", "linear", "vos")}
    assert tasks["knn"] == tasks["linear"] == [("pass", "runs on abc -> ")]
    assert tasks["vos"] == [("fail", "its video data cannot be used -> see lost above")]
    # What is named beside it counts too, and the sizes of its protocols are tried.
    assert only(look("task", [checkpoint], "vos", data=[clips], suite=str(suite)), "pass")
    text = "\n".join(only(look("checkpoint", [checkpoint], suite=str(suite)), "pass"))
    assert "encodes the sizes of its tasks: 32" in text


def test_a_suite_that_runs_a_task_on_another_kind_fails(look, checkpoint, letters, roads, tmp_path):
    suite = tmp_path / "ours.yaml"
    suite.write_text("data: {abc: letters, street: roads}\ntasks: {knn: {data: [abc, street]}}\n")
    (text,) = only(look("task", [checkpoint], suite=str(suite)), "fail")
    assert text.startswith("the suite runs it on street, a segmentation set -> it needs classification data")
    assert {status for status, _ in look("checkpoint", [checkpoint], suite=str(suite))} <= {"pass", "warn"}


def test_a_folder_that_is_not_there_fails(look, checkpoint, tmp_path):
    (text,) = only(look("data", [checkpoint], data=[tmp_path / "nowhere"]), "fail")
    assert "nowhere" in text


def test_a_missing_split_fails_and_the_task_with_it(look, checkpoint, letters):
    (letters / "val").rename(letters / "later")
    (text,) = only(look("data", [checkpoint], data=[letters]), "fail")
    assert "no test split" in text
    (text,) = only(look("task", [checkpoint], "knn", data=[letters]), "fail")
    assert str(letters) in text


def test_a_broken_image_is_named(look, checkpoint, letters):
    broken = letters / "val" / "b" / "3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    (text,) = only(look("data", [checkpoint], data=[letters]), "fail")
    assert str(broken) in text
    assert "1 of 36" in text
    assert "--skip-broken" in text


def test_a_class_without_test_images_is_a_warning(look, checkpoint, letters):
    for image in (letters / "val" / "b").iterdir():
        image.unlink()
    (text,) = only(look("data", [checkpoint], data=[letters]), "warn")
    assert "1 of 3 classes have no image: b" in text


def test_labels_outside_the_classes_fail():
    split = ArraySplit(np.zeros((4, 8, 8, 3), np.uint8), list("abcd"), np.array([0, 1, 2, 5]))
    data = Dataset("odd", "classification", "f", ("x", "y", "z"), {"train": split})
    checks = list(data_checks(Subject("data", "odd"), data, Detected("x", "classification", "y"), Reporter()))
    assert [c.status for c in checks] == ["pass", "pass", "fail"]
    assert "labels 0 to 5" in checks[-1].found


def test_an_empty_split_fails():
    split = ArraySplit(np.zeros((0, 8, 8, 3), np.uint8), [], np.zeros(0, np.int64))
    data = Dataset("empty", "classification", "f", ("x",), {"train": split})
    checks = list(
        data_checks(Subject("data", "empty"), data, Detected("x", "classification", "y"), Reporter())
    )
    assert checks[-1].status == "fail"
    assert "holds no image" in checks[-1].found


@pytest.mark.parametrize(
    ("side", "value", "reason"), [(40, 9, "the label 9"), (20, 1, "20x20"), (40, None, "colours")]
)
def test_a_mask_that_does_not_fit_is_named(look, checkpoint, roads, side, value, reason):
    mask = picture(roads / "val" / "masks" / "2.png", side, value)
    (text,) = only(look("data", [checkpoint], data=[roads]), "fail")
    assert str(mask) in text
    assert reason in text


def test_masks_of_void_alone_are_a_warning(look, checkpoint, roads):
    for mask in (roads / "val" / "masks").iterdir():
        picture(mask, value=255)
    (text,) = only(look("data", [checkpoint], data=[roads]), "warn")
    assert "void" in text


def test_short_videos_fail_and_videos_without_an_object_warn(look, checkpoint, clips):
    for part in ("JPEGImages", "Annotations"):
        for i in range(2):
            picture(clips / part / "480p" / "dog" / f"{i:05d}.png", value=int(part == "Annotations"))
    picture(clips / "Annotations" / "480p" / "cat" / "00000.png", value=0)
    found = look("data", [checkpoint], data=[clips])
    assert any("dog: fewer than 3 frames" in text for text in only(found, "fail"))
    assert any("cat: no object" in text for text in only(found, "warn"))


def test_a_task_without_data_says_which_to_add(look, checkpoint, letters):
    (text,) = only(look("task", [checkpoint], "vos", data=[letters]), "warn")
    assert "embedded" in text
    assert "--data DIR" in text
    assert "JPEGImages" in text


def test_data_that_no_chosen_task_takes_fail(look, checkpoint, roads):
    (text,) = only(look("data", [checkpoint], tasks=["knn"], data=[roads]), "fail")
    assert "none of the chosen tasks takes one" in text


# ------------------------------------------------------------------------------------------- checkpoints


def test_a_good_checkpoint_passes_every_check(look, checkpoint, letters, roads):
    found = look("checkpoint", [checkpoint], data=[letters, roads])
    assert {status for status, _ in found} == {"pass"}
    text = "\n".join(text for _, text in found)
    assert "54 of 54 tensors" in text
    assert "features are finite and differ" in text
    assert "32, 64 pixels" in text
    assert "hidden_patches will be left out: there is no decoder beside it" in text


def test_a_checkpoint_that_cannot_be_loaded_fails_beside_one_that_can(look, checkpoint, tmp_path):
    page = tmp_path / "page.pth"
    page.write_text("<!doctype html><html>login</html>")
    (text,) = only(look("checkpoint", [page, checkpoint], "page"), "fail")
    assert "page.pth" in text
    assert {status for status, _ in look("checkpoint", [page, checkpoint], "tiny")} == {"pass"}


def test_random_weights_are_a_warning(look):
    (text,) = only(look("checkpoint", ["timm:vit_tiny_patch16_224#image_size=64"]), "warn")
    assert "random weights: 0 of" in text


def test_guessed_heads_are_a_warning(look, tmp_path):
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=128, depth=1, num_heads=2, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "odd.pth")
    warned = only(look("checkpoint", [tmp_path / "odd.pth"]), "warn")
    assert any("guess" in text and "#heads=N" in text for text in warned)


def test_the_same_weights_twice_are_a_warning(look, checkpoint):
    (text,) = only(look("checkpoint", [checkpoint, f"again={checkpoint}"]), "warn")
    assert "the same weights as tiny" in text


def test_tensors_that_are_not_filled_fail():
    info = CheckpointInfo(
        source="x", sha256=None, format="x", container="", parameters=9, loaded_tensors=3, encoder_tensors=5
    )
    assert _coverage(Subject("checkpoint", "x"), info).status == "fail"
    assert (
        _coverage(Subject("checkpoint", "x"), info.model_copy(update={"loaded_tensors": 5})).status == "pass"
    )


FACTORIES = """
import torch

class Odd(torch.nn.Module):
    embed_dim, patch_size, image_size = 4, 8, 32

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward_features(self, images):
        pooled = torch.nn.functional.avg_pool2d(images, 8)
        return self.make(torch.cat([pooled, pooled[:, :1]], dim=1))

def refuse(map):
    if map.shape[-1] != 4:
        from lmim_bench.bench.errors import TaskError
        raise TaskError("only 32 pixels, please")
    return map

constant = lambda: Odd(lambda map: torch.ones_like(map))
flat = lambda: Odd(lambda map: map.mean(dim=(2, 3), keepdim=True).expand_as(map))
broken = lambda: Odd(lambda map: map * float("nan"))
crashing = lambda: Odd(lambda map: map if map.shape[-1] == 4 else 1 / 0)
hopeless = lambda: Odd(lambda map: 1 / 0)
one_size = lambda: Odd(refuse)
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "odd_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return "python:odd_factories:{}".format


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("constant", "warn", "the same global feature"),
        ("flat", "warn", "all patches of a picture"),
        ("broken", "fail", "not finite"),
        ("crashing", "fail", "unexpected ZeroDivisionError"),
        ("hopeless", "fail", "cannot encode images of 32 pixels in float32: ZeroDivisionError"),
        ("one_size", "fail", "unsup_seg on roads cannot be scored -> only 32 pixels, please"),
    ],
)
def test_features_that_tell_nothing_are_found(look, factory, checkpoint, roads, name, status, reason):
    found = look("checkpoint", [factory(name), checkpoint], tasks=["unsup_seg"], data=[roads])
    (text,) = only(found, status)
    assert reason in text


def test_debug_keeps_the_traceback_of_an_unexpected_error(look, factory, roads):
    with pytest.raises(ZeroDivisionError):
        look("checkpoint", [factory("crashing")], tasks=["unsup_seg"], data=[roads], debug=True)


# ----------------------------------------------------------------------------------------- the command


def invoke(tmp_path, *args):
    common = ("--device", "cpu", "--out", tmp_path / "out", "--cache-dir", tmp_path / "cache")
    return CliRunner().invoke(cli, [str(a) for a in ("doctor", *common, *args)])


def test_exit_code_zero_with_warnings_and_one_with_a_failure(tmp_path, checkpoint, letters):
    well = invoke(tmp_path, "--ckpt", checkpoint, "--data", letters)
    assert well.exit_code == 0, well.output
    lines = well.stdout.splitlines()
    assert {line.split()[0] for line in lines[:-1]} <= {"pass", "warn"}
    assert any(line.startswith("warn  task vos") for line in lines)
    assert lines[-1].endswith(" 0 fail")
    assert not (tmp_path / "out").exists()
    ill = invoke(tmp_path, "--ckpt", "nowhere.pth", "--tasks", "knn")
    assert ill.exit_code == 1
    assert any(line.startswith("fail  checkpoint nowhere") for line in ill.stdout.splitlines())
    assert "Traceback" not in ill.output


def test_long_paths_leave_a_terminal_room_for_what_was_found(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    result = invoke(
        tmp_path, "--ckpt", checkpoint, "--tasks", "knn", "--data", tmp_path / "deep" / ("x" * 90)
    )
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in result.stdout.splitlines()]
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:4] == ["fail", "data", "cannot", "be"] for line in lines)


def test_json_holds_every_check(tmp_path, checkpoint):
    result = invoke(tmp_path, "--ckpt", checkpoint, "--ckpt", "nowhere.pth", "--tasks", "knn", "--json")
    assert result.exit_code == 1
    checks = json.loads(result.stdout)
    assert all(set(check) == {"area", "name", "status", "found", "mend"} for check in checks)
    assert [c["name"] for c in checks if c["status"] == "fail"] == ["nowhere"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--ckpt", "pixels", "--tasks", "knnn"), "Did you mean 'knn'?"),
        (("--ckpt", "pixels", "--ckpt", "pixels"), "two checkpoints are called"),
        (("--ckpt", "pixels", "--device", "tpu"), "device"),
        ((), "--ckpt"),
    ],
)
def test_wrong_usage_is_exit_code_two(tmp_path, args, message):
    result = invoke(tmp_path, *args)
    assert result.exit_code == 2
    assert message in result.stderr


def test_an_unknown_task_is_no_finding(checkpoint):
    with pytest.raises(ConfigError, match="Did you mean 'knn'"):
        examine(make_config([str(checkpoint)], tasks=["knnn"]), Reporter())
