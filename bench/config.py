"""What a user can choose, declared once: the command line, YAML suites and the Python API all end here."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from .errors import ConfigError, did_you_mean
from .references import FORMS, SCHEMES, at_home, file_at_home, is_path, name_of
from .types import DataKind, Frozen

Overwrite = Literal["only-missing", "never", "always"]
Precision = Literal["fp32", "bf16", "fp16"]
Model = TypeVar("Model", bound=BaseModel)

DEFAULT_SUITE = "scenes"
LONGEST_LABEL = 80


class CheckpointConfig(Frozen):
    """One checkpoint: where it is, and what it is called in tables."""

    reference: str = Field(description=FORMS, min_length=1)
    label: str = Field(description="name in tables and files", min_length=1, max_length=LONGEST_LABEL)

    @field_validator("reference")
    @classmethod
    def _at_home(cls, value: str) -> str:
        return file_at_home(value)

    @staticmethod
    def parse(text: str) -> CheckpointConfig:
        """``label=reference``, or a reference alone, whose file name or model name is the label."""
        label, equals, reference = text.partition("=")
        if equals and not Path(text.partition("#")[0]).exists() and _is_label(label, reference):
            return validate(CheckpointConfig, {"label": label.strip(), "reference": reference}, "--ckpt")
        label = _shortened(name_of(file_at_home(text)) or text)
        return validate(CheckpointConfig, {"label": label, "reference": text}, "--ckpt")


def _shortened(name: str) -> str:
    """A name that fits a label: of a long one the end, which tells the files of a series apart."""
    return name if len(name) <= LONGEST_LABEL else "…" + name[1 - LONGEST_LABEL :]


def _is_label(label: str, reference: str) -> bool:
    """Whether what stands before ``=`` is a label, not the beginning of a path or of a choice behind #."""
    if "#" in label or label.startswith(SCHEMES):
        return False
    known = not is_path(reference) or Path(file_at_home(reference).partition("#")[0]).exists()
    return known or "/" not in label


class DataConfig(Frozen):
    """One data set of a suite."""

    path: str = Field(description="folder, torchvision:NAME[:ROOT], or an embedded set (scenes, ...)")
    kind: DataKind | None = Field(default=None, description="found from the layout unless given")
    layout: str | None = Field(default=None, description="found from the folder unless given")
    train: str | None = Field(default=None, description="name of the training split")
    test: str | None = Field(default=None, description="name of the split that is scored")
    void: tuple[Annotated[int, Field(ge=0, le=255)], ...] | None = Field(
        default=None, description="labels that are left out of every count"
    )
    classes: tuple[str, ...] | None = Field(default=None, description="class names, in label order")


class TaskEntry(Frozen):
    """One task of a suite: its data sets, and the protocol fields that differ from the defaults."""

    data: tuple[str, ...] = ()
    protocol: dict[str, Any] = {}


class Suite(Frozen):
    """A named collection of data sets and of tasks on them."""

    name: str = "suite"
    data: dict[str, DataConfig] = {}
    tasks: dict[str, TaskEntry] = {}


class RunConfig(Frozen):
    """Everything that ``lmim-bench run`` and ``lmim_bench.run`` take."""

    checkpoints: tuple[CheckpointConfig, ...] = Field(min_length=1, description="what is scored")
    tasks: tuple[str, ...] = Field(default=("all",), description="task names, or all")
    suite: str | None = Field(default=None, description="suite file, or the name of a built-in suite")
    data: tuple[str, ...] = Field(default=(), description="data folders; the layout says what each is")
    overrides: dict[str, dict[str, Any]] = Field(default={}, description="task -> protocol field -> value")
    out: Path | None = Field(default=None, description="run folder; runs/<labels> unless given")
    limit: int | None = Field(default=None, ge=1, description="at most N images a split, N frames a video")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    precision: Precision = Field(
        default="fp32", description="arithmetic of the encoder; features are kept in fp32"
    )
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="one set of cells a seed")
    workers: int | None = Field(
        default=None, ge=0, description="decoding processes; by the machine unless given"
    )
    batch_size: int | None = Field(
        default=None, ge=1, description="images a batch at 224 x 224, scaled by area"
    )
    skip_broken: bool = Field(default=False, description="leave broken images out, count and list them")
    keep_pixels: bool = Field(
        default=False, description="keep decoded images in the cache, for other checkpoints"
    )
    download: bool = Field(default=False, description="fetch torchvision data sets that are not there")
    cache_dir: Path | None = Field(default=None, description="feature cache and embedded data")
    cache_size_gb: float = Field(
        default=50.0, gt=0, allow_inf_nan=False, description="bound of the feature cache"
    )
    overwrite: Overwrite = Field(
        default="only-missing", description="what happens to cells that are already there"
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @field_validator("data", mode="before")
    @classmethod
    def _references(cls, value: Any) -> Any:
        listed = [value] if isinstance(value, str | Path) else value
        several = isinstance(listed, list | tuple)
        return [str(one) if isinstance(one, Path) else one for one in listed] if several else listed

    @field_validator("suite", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("seeds", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else value

    @field_validator("out", "cache_dir")
    @classmethod
    def _at_home(cls, value: Path | None) -> Path | None:
        return at_home(value) if value else None

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, value: str) -> str:
        if not re.match(r"^(auto|cpu|cuda(:\d+)?)$", value):
            raise ValueError(f"there is no device {value!r}; use auto, cpu, cuda or cuda:N")
        return value

    @field_validator("checkpoints")
    @classmethod
    def _labels_differ(cls, value: tuple[CheckpointConfig, ...]) -> tuple[CheckpointConfig, ...]:
        labels = [c.label for c in value]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two checkpoints are called {label!r}; give labels: --ckpt NAME=PATH")
        return value


class RunOptions(TypedDict, total=False):
    """The options of ``lmim_bench.run`` for editors and type checkers, as ``RunConfig`` takes them."""

    tasks: str | Sequence[str]
    suite: str | Path | None
    data: str | Path | Sequence[str | Path]
    overrides: Mapping[str, Mapping[str, Any]]
    out: str | Path | None
    limit: int | None
    device: str
    precision: Precision
    seeds: int | Sequence[int]
    workers: int | None
    batch_size: int | None
    skip_broken: bool
    keep_pixels: bool
    download: bool
    cache_dir: str | Path | None
    cache_size_gb: float
    overwrite: Overwrite


def validate(model: type[Model], payload: Mapping[str, Any], where: str) -> Model:
    """Build a model, turning pydantic's report into one line that names the field and the mend.

    Args:
        model: the pydantic model.
        payload: the fields.
        where: what the fields belong to, for the message (``knn``, ``suite.yaml``).

    Raises:
        ConfigError: an unknown field (with the nearest known name) or a wrong value.
    """
    try:
        return model.model_validate(dict(payload))
    except ValidationError as error:
        raise ConfigError(_explain(model, error, where)) from None


def _explain(model: type[BaseModel], error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, path[:-1])
        at = ".".join([*where.split(), *path[:-1]]) or "a run"
        return f"{at} has no field {path[-1]!r}. {did_you_mean(path[-1], known)}"
    message = first["msg"].removeprefix("Value error, ")
    at = ".".join([*where.split(), *path])
    if first["type"] == "value_error":
        return f"{at}: {message}" if where and path else message
    if first["type"] in ("too_short", "string_too_short"):
        unit = "letter" if first["type"].startswith("string") else "value"
        return f"{at}: needs at least {first['ctx']['min_length']} {unit}"
    return f"{at}: {message[0].lower() + message[1:]}, got {first.get('input')!r}"


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    current: Any = model
    for part in path:
        if _is_model(current):
            current = current.model_fields[part].annotation if part in current.model_fields else current
        elif get_origin(current) is dict:
            current = get_args(current)[1]
    if get_origin(current) is dict:
        current = get_args(current)[1]
    if _is_model(current):
        return list(current.model_fields)
    return list(model.model_fields)


def _is_model(annotation: Any) -> bool:
    # Python 3.10 takes dict[str, int] for a class of its own.
    return (
        get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel)
    )


def parse_override(text: str) -> tuple[str, str, str]:
    """``knn.k=1,20`` to (task, field, raw value). Raises ConfigError where it is not of that form."""
    match = re.match(r"^([\w-]+)\.([\w-]+)=(.*)$", text)
    if not match:
        raise ConfigError(f"--set takes TASK.FIELD=VALUE (knn.k=1,10,20), got {text!r}")
    return match[1], match[2].replace("-", "_"), match[3]


def coerce(model: type[BaseModel], field: str, raw: Any) -> Any:
    """A command-line string as the field's type expects it; pydantic checks it afterwards.

    Lists are split at commas, one number is a list of one, ``none`` is None where the field allows it; other
    values pass through.
    """
    if not isinstance(raw, str | int | float) or isinstance(raw, bool) or field not in model.model_fields:
        return raw
    annotation = model.model_fields[field].annotation
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if not isinstance(raw, str):
        return [raw] if any(get_origin(option) in (tuple, list) for option in options) else raw
    if raw.lower() in ("none", "null", "") and type(None) in options:
        return None
    if any(get_origin(option) in (tuple, list) for option in options):
        return [part.strip() for part in raw.strip("[]()").split(",") if part.strip()]
    return raw


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans and floats: ``on`` and ``off`` stay words, ``1e-3`` is a number.

    A key that is given twice is an error, where PyYAML keeps the last.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as it is written, before ``<<`` brings in the keys of others."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                problem = f"{key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.I), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises ConfigError naming the file where it is anything else."""
    try:
        payload = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the {what} {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(payload, dict):
        raise ConfigError(f"{path} must be a mapping")
    return payload


def load_suite(reference: str) -> Suite:
    """Read a suite file, or a built-in suite by name. Paths in a file are relative to that file.

    Raises:
        ConfigError: no such suite, not YAML, or an unknown field.
    """
    built_in = Path(__file__).parent / "suites"
    path = at_home(reference)
    if not path.suffix and not path.exists():
        path = built_in / f"{reference}.yaml"
        if not path.is_file():
            names = [p.stem for p in built_in.glob("*.yaml")]
            raise ConfigError(f"there is no suite {reference!r}. {did_you_mean(reference, names)}")
    payload = read_yaml(path, "suite")
    return _suite_from(payload, path, relative_to=None if path.parent == built_in else path.parent)


def _suite_from(payload: dict[str, Any], path: Path, relative_to: Path | None) -> Suite:
    for section in ("data", "tasks"):
        entries = payload.get(section) or {}
        if not isinstance(entries, dict):
            raise ConfigError(f"{path}: `{section}` must be a mapping of names")
        payload[section] = dict(entries)
    for name, entry in payload["data"].items():
        fields = {"path": entry} if isinstance(entry, str) else _fields(entry, f"{path}: data.{name}")
        target = str(fields.get("path", ""))
        if relative_to and target and not Path(target).is_absolute() and (relative_to / target).exists():
            fields["path"] = str((relative_to / target).resolve())
        payload["data"][name] = fields
    for name, entry in payload["tasks"].items():
        fields = _fields(entry, f"{path}: tasks.{name}")
        names: Any = fields.pop("data", [])
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(data, str) for data in names):
            raise ConfigError(f"{path}: tasks.{name}.data must be a name or a list of names, got {names!r}")
        payload["tasks"][name] = {"data": names, "protocol": fields}
        for data in names:
            if data not in payload["data"]:
                raise ConfigError(
                    f"{path}: the task {name!r} names the data set {data!r}, which `data` does not hold. "
                    f"{did_you_mean(data, map(str, payload['data']))}"
                )
    return validate(Suite, {"name": path.stem, **payload}, str(path))


def _fields(entry: Any, where: str) -> dict[str, Any]:
    """The fields of an entry of a suite. Raises ConfigError where it is no mapping."""
    if entry is not None and not isinstance(entry, dict):
        raise ConfigError(f"{where} must be a mapping of fields, got {entry!r}")
    return dict(entry or {})
