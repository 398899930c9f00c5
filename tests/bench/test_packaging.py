"""The package as others get it: what the wheel holds, what importing it costs, which way imports run."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lmim_bench

REPO = Path(__file__).parents[2]
ROOMS = ("bench", "tasks", "pretrain", "reports")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def sources() -> list[Path]:
    return [p for room in ROOMS for p in (REPO / room).rglob("*.py")] + [
        REPO / "__init__.py",
        REPO / "__main__.py",
    ]


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_template_and_one_top_level_name(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(REPO)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    patterns = (
        "reports/templates/*",
        "bench/suites/*.yaml",
        "pretrain/recipes/*.yaml",
        "pretrain/*.yaml",
        "reports/*.yaml",
    )
    extra = [p for pattern in patterns for p in REPO.glob(pattern)]
    for path in [*sources(), *extra, REPO / "py.typed"]:
        assert f"lmim_bench/{path.relative_to(REPO).as_posix()}" in names
    (top_level,) = (n for n in names if n.endswith("top_level.txt"))
    assert zipfile.ZipFile(wheel).read(top_level).decode().split() == ["lmim_bench"]
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"lmim_bench"}


@pytest.mark.parametrize(
    "code",
    [
        "import lmim_bench; lmim_bench.__version__",
        "from lmim_bench import RunConfig, task, load_run",
        "import lmim_bench.bench.cli",
        "from lmim_bench.tasks import registry; registry()",
        "import lmim_bench.bench.plan",
        "import lmim_bench.reports.html",
        "import lmim_bench.bench.opening",
        "from lmim_bench.bench.cli import cli; cli(['--help'], standalone_mode=False)",
    ],
)
def test_light_imports_do_not_load_torch(code):
    assert python(f"{code}\nimport sys\nprint('torch' in sys.modules)").splitlines()[-1] == "False"


def test_help_loads_no_numbers():
    code = "from lmim_bench.bench.cli import cli; cli(['--help'], standalone_mode=False)"
    assert python(f"{code}\nimport sys\nprint('numpy' in sys.modules)").splitlines()[-1] == "False"


def test_no_room_is_importable_as_a_bare_name():
    loaded = set(sys.modules)
    assert not loaded & set(ROOMS)
    assert Path(lmim_bench.__file__).name == "__init__.py"


def test_every_public_name_loads_and_an_unknown_one_does_not():
    for name in lmim_bench.__all__:
        assert getattr(lmim_bench, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = lmim_bench.nothing


# A module may import from its own level and from those above it.
LEVELS = [
    (
        "bench.errors",
        "bench.references",
        "bench.atomic",
        "bench.names",
        "bench.options",
        "bench.random_state",
    ),
    ("bench.types",),
    (
        "bench.config",
        "bench.results",
        "bench.stats",
        "bench.comparison",
        "bench.cache",
        "bench.room",
        "bench.banks",
        "bench.claims",
        "bench.cores",
        "bench.environment",
        "bench.progress",
    ),
    (
        "bench.vit",
        "bench.backbones",
        "bench.modules",
        "bench.timm_models",
        "bench.transformers_models",
        "bench.networks",
        "bench.building",
        "bench.checkpoints",
        "bench.trial",
        "bench.encoders",
        "bench.exporting",
        "bench.export",
        "bench.data",
        "bench.engine",
        "bench.cost",
    ),
    ("bench.features",),
    ("tasks",),
    ("bench.plan", "bench.context", "bench.cells"),
    ("bench.records",),
    ("reports", "pretrain", "bench.runner", "bench.doctor", "bench.doctor_data", "bench.doctor_system"),
    ("bench.opening",),
    ("bench.estimate", "bench.trainings"),
    ("bench.api",),
    ("bench.ablation",),
    ("bench.demo", "bench.selftest"),
    (
        "bench.cli",
        "bench.training_commands",
        "bench.checkpoint_commands",
        "bench.report_commands",
        "bench.show",
    ),
]


def level(module: str) -> int | None:
    for depth, group in enumerate(LEVELS):
        if any(module == name or module.startswith(f"{name}.") for name in group):
            return depth
    return None


def imports(path: Path) -> list[str]:
    base = path.relative_to(REPO).with_suffix("").parts
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            root = base[: len(base) - node.level]
            target = ".".join([*root, *(node.module or "").split(".")]).strip(".")
            found += [target] if node.module else [".".join([*root, a.name]) for a in node.names]
    return found


def test_imports_run_one_way():
    wrong = []
    for path in sources():
        parts = path.relative_to(REPO).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        here = level(module)
        for target in imports(path):
            there = level(target)
            if here is not None and there is not None and there > here:
                wrong.append(f"{module} imports {target}")
    assert not wrong


def test_the_architecture_names_every_room():
    told = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {p.name + ("/" if p.is_dir() else "") for p in (REPO / "bench").iterdir()}
    assert [room for room in sorted(rooms) if not room.startswith("_") and room not in told] == []


def test_every_module_has_a_level():
    modules = [
        ".".join(p.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__") for p in sources()
    ]
    skip = {"__init__", "__main__", "bench", "bench.suites"}
    assert [m for m in modules if level(m) is None and m not in skip] == []
