from pathlib import Path

import pytest
from pydantic import Field

from lmim_bench.bench.api import make_config, run
from lmim_bench.bench.config import (
    CheckpointConfig,
    DataConfig,
    RunConfig,
    RunOptions,
    coerce,
    load_suite,
    parse_override,
    validate,
)
from lmim_bench.bench.errors import ConfigError, DataError
from lmim_bench.bench.plan import make_plan
from lmim_bench.bench.types import Frozen


class Config(Frozen):
    k: tuple[int, ...] = (1, 2)
    size: int | None = None
    norm: str = Field("auto", pattern="^(auto|on|off)$")
    rate: float = 0.1
    flag: bool = False


@pytest.mark.parametrize("label", [-1, 256])
def test_void_labels_are_those_that_a_mask_can_hold(label):
    assert validate(DataConfig, {"path": "x", "void": [0, 255]}, "suite.yaml").void == (0, 255)
    with pytest.raises(ConfigError, match=rf"^suite\.yaml\.void\.1: [^\n]*, got {label}$"):
        validate(DataConfig, {"path": "x", "void": [0, label]}, "suite.yaml")


@pytest.mark.parametrize(
    ("field", "raw", "value"),
    [
        ("k", "1,10,20", (1, 10, 20)),
        ("k", "[5]", (5,)),
        ("size", "none", None),
        ("size", "448", 448),
        ("norm", "on", "on"),
        ("rate", "1e-3", 0.001),
        ("flag", "true", True),
        ("flag", "off", False),
    ],
)
def test_command_line_strings_become_what_the_field_expects(field, raw, value):
    assert getattr(validate(Config, {field: coerce(Config, field, raw)}, "task"), field) == value


class Knn(Frozen):
    temperature: float = 0.07


def test_unknown_field_names_the_nearest():
    with pytest.raises(ConfigError, match=r"^knn has no field 'tempratur'\. Did you mean 'temperature'\?$"):
        validate(Knn, {"tempratur": 1}, "knn")


def test_wrong_value_says_what_was_expected_and_got():
    with pytest.raises(ConfigError, match=r"^task\.rate: .*number.*got 'fast'"):
        validate(Config, {"rate": "fast"}, "task")


@pytest.mark.parametrize(
    ("text", "label", "reference"),
    [
        ("mae=a/b.pth", "mae", "a/b.pth"),
        ("<b>x</b>=pixels", "<b>x</b>", "pixels"),
        ("runs/lr=1/model.pth", "model", "runs/lr=1/model.pth"),
        ("a/b.pth", "b", "a/b.pth"),
        ("timm:vit_tiny_patch16_224", "vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"),
        ("x=timm:vit_tiny_patch16_224", "x", "timm:vit_tiny_patch16_224"),
        ("a/b.pth#heads=6", "b#heads=6", "a/b.pth#heads=6"),
        ("python:pkg.mod:make", "pkg.mod:make", "python:pkg.mod:make"),
        ("pixels", "pixels", "pixels"),
        ("pixels=pixels", "pixels", "pixels"),
        ("a/b=pixels:8", "a/b", "pixels:8"),
        ("timm:x:pretrained", "x (pretrained)", "timm:x:pretrained"),
        ("random:a/b.pth", "b (random)", "random:a/b.pth"),
        ("random:timm:vit_base.lvd142m", "vit_base.lvd142m (random)", "random:timm:vit_base.lvd142m"),
        ("a/b=random:timm:x", "a/b", "random:timm:x"),
        ("hf:models/vit", "vit", "hf:models/vit"),
        ("a/b=hf:models/vit", "a/b", "hf:models/vit"),
        ("hf:runs/lr=1/vit", "vit", "hf:runs/lr=1/vit"),
    ],
)
def test_checkpoint_references(text, label, reference):
    assert CheckpointConfig.parse(text) == CheckpointConfig(label=label, reference=reference)


@pytest.mark.parametrize(
    ("text", "label", "reference"),
    [
        ("mae=~/a/b.pth", "mae", "{}/a/b.pth"),
        ("~/a/b.pth#student", "b#student", "{}/a/b.pth#student"),
        ("~/vit.b16", "vit.b16", "{}/vit.b16"),
        ("x=random:hf:~/vit.b16", "x", "random:hf:{}/vit.b16"),
    ],
)
def test_a_tilde_is_the_users_home_wherever_it_stands(tmp_path, monkeypatch, text, label, reference):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "vit.b16").mkdir()
    found = CheckpointConfig.parse(text)
    assert (found.label, found.reference) == (label, reference.format(tmp_path))
    config = make_config("pixels", out="~/runs/x", cache_dir=Path("~/cache"))
    assert (config.out, config.cache_dir) == (tmp_path / "runs" / "x", tmp_path / "cache")


def test_one_of_a_list_needs_no_list_and_a_path_is_as_good_as_its_text():
    config = make_config(Path("a.pth"), data=Path("pets"), tasks="knn, vos", seeds=3, suite=Path("ours.yaml"))
    assert config.checkpoints[0].reference == "a.pth"
    assert config.data == ("pets",)
    assert config.tasks == ("knn", "vos")
    assert config.seeds == (3,)
    assert config.suite == "ours.yaml"
    assert make_config("pixels", data=["a", Path("b")]).data == ("a", "b")
    assert coerce(Config, "k", 3) == [3]


def test_the_options_that_an_editor_offers_are_those_of_a_run():
    assert list(RunOptions.__annotations__) == [
        name for name in RunConfig.model_fields if name != "checkpoints"
    ]


def test_a_config_takes_no_options_beside_it():
    with pytest.raises(ConfigError, match="out, limit beside it would have no effect"):
        run(config=make_config("pixels"), out="elsewhere", limit=4)


def test_a_checkpoint_and_its_control_have_labels_of_their_own(tmp_path):
    (tmp_path / "vit.b16").mkdir()
    for path in ("models/mae.pth", str(tmp_path / "vit.b16")):
        config = make_config([path, f"random:{path}"])
        assert [c.label for c in config.checkpoints] == [
            Path(path).name.removesuffix(".pth"),
            config.checkpoints[0].label + " (random)",
        ]


def test_a_file_whose_name_holds_an_equals_sign_is_a_file(tmp_path):
    path = tmp_path / "lr=1.pth"
    path.touch()
    assert CheckpointConfig.parse(str(path)).reference == str(path)


@pytest.mark.parametrize("before", ["", "timm:", "python:"])
def test_of_a_long_name_the_end_is_the_label(before):
    first, second = (CheckpointConfig.parse(f"{before}{'x' * 90}-{epoch}") for epoch in (100, 200))
    assert len(first.label) == 80
    assert first.label.startswith("…x")
    assert first.label.endswith("x-100")
    assert first.label != second.label


@pytest.mark.parametrize("text", ["", "x=", "x" * 81 + "=pixels"])
def test_an_empty_reference_and_a_label_that_is_too_long_are_one_line(text):
    told = r"needs at least 1 letter|string should have at most 80 characters, [^\n]*"
    with pytest.raises(ConfigError, match=rf"^--ckpt\.(reference|label): ({told})$"):
        CheckpointConfig.parse(text)


def test_a_label_of_the_python_api_is_checked_in_one_line():
    with pytest.raises(ConfigError, match=r"^ckpt\.label: string should have at most 80 characters, [^\n]*$"):
        make_config({"x" * 81: "pixels"})


def test_the_cache_has_a_size():
    with pytest.raises(ConfigError, match=r"cache_size_gb: [^\n]*finite[^\n]*$"):
        make_config("pixels", cache_size_gb=float("inf"))


def test_labels_must_differ():
    pair = [CheckpointConfig.parse("a/x.pth"), CheckpointConfig.parse("b/x.pth")]
    with pytest.raises(ConfigError, match="two checkpoints are called 'x'"):
        validate(RunConfig, {"checkpoints": pair}, "run")


@pytest.mark.parametrize("text", ["knn", "knn.k", "k=1", "knn k=1"])
def test_malformed_override(text):
    with pytest.raises(ConfigError, match="--set takes"):
        parse_override(text)


def test_override_keeps_what_follows_the_first_equals_sign():
    assert parse_override("vos.note=a=b") == ("vos", "note", "a=b")


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    return str(path)


def test_suite_paths_are_relative_to_the_file_and_words_stay_words(tmp_path):
    (tmp_path / "birds").mkdir()
    suite = load_suite(
        write(
            tmp_path,
            "data:\n  birds: {path: birds, kind: classification}\n  other: cifar\n"
            "tasks:\n  knn: {data: birds, final_norm: on, temperature: 1e-2, k: [1, 5]}\n",
        )
    )
    assert suite.data["birds"].path == str(tmp_path / "birds")
    assert suite.data["other"].path == "cifar"
    assert suite.tasks["knn"].data == ("birds",)
    assert suite.tasks["knn"].protocol == {"final_norm": "on", "temperature": 0.01, "k": [1, 5]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [1", "not valid YAML"),
        ("- a", "must be a mapping"),
        ("tasks: 3", "`tasks` must be a mapping"),
        ("data: {a: b}\ntasks: {knn: {data: c}}", "names the data set 'c'"),
        ("data: {a: {path: b, knd: video}}", "no field 'knd'. Did you mean 'kind'"),
        ("dat: {}", "no field 'dat'. Did you mean 'data'"),
        ("data: {x: 5}", "data.x must be a mapping of fields, got 5"),
        ("data: {x: [d/im]}", r"data.x must be a mapping of fields, got \['d/im'\]"),
        ("data: {x: }", "data.x.path: field required"),
        ("tasks: {knn: foo}", "tasks.knn must be a mapping of fields, got 'foo'"),
        ("tasks: {knn: {data: }}", "tasks.knn.data must be a name or a list of names, got None"),
        ("tasks: {knn: {data: 5}}", "tasks.knn.data must be a name or a list of names, got 5"),
        ("tasks: {knn: {data: [[x]]}}", r"tasks.knn.data must be a name or a list of names, got \[\['x'\]\]"),
        ("data: {5: a, x: b}\ntasks: {knn: {data: c}}", "names the data set 'c'"),
        ("data: {a: b}\ndata: {c: d}", "not valid YAML: 'data' is given twice .*line 2"),
        ("data:\n  a: b\n  a: c", "not valid YAML: 'a' is given twice .*line 3"),
    ],
)
def test_broken_suites_say_what_is_wrong(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_suite(write(tmp_path, text))


def test_what_a_suite_merges_is_not_given_twice(tmp_path):
    text = (
        "tasks:\n  knn: {protocols: &b {<<: &a {k: [1]}, k: [5]}}\n"
        "  linear:\n    <<: *b\n    k: [7]\n  few_shot: {<<: *a}\n"
    )
    suite = load_suite(write(tmp_path, text))
    assert suite.tasks["linear"].protocol == {"k": [7]}
    assert suite.tasks["few_shot"].protocol == {"k": [1]}


# ------------------------------------------------------------------------------------------- plans


def plan(tmp_path: Path, text: str = "", **options):
    suite = write(tmp_path, text) if text else None
    return make_plan(make_config("pixels", suite=suite, **options))


def test_a_misspelled_task_of_a_suite_is_refused_whichever_tasks_are_chosen(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'linear'"):
        plan(tmp_path, "data: {s: scenes}\ntasks: {liner: {data: s}}", tasks="knn")


def test_the_layout_that_a_suite_gives_says_what_its_data_are(tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "notes.txt").touch()
    made = plan(tmp_path, "data: {mine: {path: odd, layout: imagefolder}}", tasks="knn")
    assert [evaluation.data for evaluation in made.evaluations] == ["mine"]
    with pytest.raises(DataError, match="there is no layout 'imagefoldr'"):
        plan(tmp_path, "data: {mine: {path: odd, layout: imagefoldr}}", tasks="knn")


def test_what_is_named_twice_is_scored_once(tmp_path):
    text = "data: {s: scenes}\ntasks: {knn: {data: [s, s]}}"
    assert len(plan(tmp_path, text, tasks=["knn"], seeds=(0, 1, 0)).cells()) == 2
    assert len(plan(tmp_path, tasks=["knn"], data=["scenes", "scenes"]).cells()) == 1


def test_unknown_suite_name():
    with pytest.raises(ConfigError, match="Did you mean 'scenes'"):
        load_suite("scnes")


def test_too_few_values_are_told_in_plain_words():
    with pytest.raises(ConfigError, match=r"^seeds: needs at least 1 value$"):
        make_config("pixels", seeds=())
