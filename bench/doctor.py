"""Whether a run would go through: versions, device, data sets, tasks, checkpoints and disks, each looked at.

Nothing is scored, and nothing is written but what opening a data set keeps in the cache. The rules are those
of the run itself: it is the plan, the loaders and the engine that are asked here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from .cache import cache_folder
from .cells import Cell, requests_of, wanted_by
from .config import CheckpointConfig, DataConfig, RunConfig, Suite, TaskEntry, load_suite
from .data.layouts import LAYOUTS
from .data.workers import decoding_workers
from .doctor_data import data_checks
from .doctor_system import GB, Check, Subject, device, existing, packages, room, shared_memory
from .encoders import load_encoder
from .engine import Engine, resolve_device
from .errors import ConfigError, LmimBenchError, first_line
from .names import cell_id
from .plan import RunPlan, layout_of, left_out_because, make_plan, open_data, run_folder
from .progress import Reporter
from .results import CheckpointRecord, warnings_in
from .types import CheckpointInfo, DataKind, Dataset, Tap, View

if TYPE_CHECKING:
    import torch

__all__ = ["Check", "examine"]

_OUT_GB = 1.0
_SAME = 0.01
"""Features that differ by a smaller share of their length are taken for the same."""


def examine(config: RunConfig, reporter: Reporter, debug: bool = False) -> list[Check]:
    """Look at everything that a run of this configuration would need.

    A check that fails never stops the others. With ``debug`` an unexpected error keeps its traceback.

    Raises:
        ConfigError: an unknown task: wrong usage, not a finding.
    """
    return list(_Examination(config, reporter, debug).checks())


@dataclass
class _Source:
    """A data set that is asked for: of ``--data``, called by its reference, or of the suite."""

    name: str
    entry: DataConfig
    of_suite: bool
    kind: DataKind | None = None
    """Where the layout was recognised."""
    opened: Dataset | None = None
    """Where it could be."""


@dataclass
class _Examination:
    config: RunConfig
    reporter: Reporter
    debug: bool
    sources: list[_Source] = field(default_factory=list)
    records: dict[str, CheckpointRecord] = field(default_factory=dict)
    """Label -> the checkpoint, where it could be loaded."""
    left_out: set[tuple[str, str]] = field(default_factory=set)
    """(label, task) that do not go together."""

    @cached_property
    def suite(self) -> Suite:
        """The suite of the run; an empty one where it has none."""
        return load_suite(self.config.suite) if self.config.suite else Suite()

    def checks(self) -> Iterator[Check]:
        tasks = {e.task.name: e.task for e in self._plan().evaluations}
        yield from packages()
        yield device(self.config.device)
        workers = decoding_workers(self._device(), self.config.workers)
        if workers:
            yield shared_memory(workers)
        self.sources = [_Source(name, entry, True) for name, entry in self.suite.data.items()]
        self.sources += [
            _Source(reference, DataConfig(path=reference), False)
            for reference in dict.fromkeys(self.config.data)
        ]
        for source in self.sources:
            subject = Subject("data", source.name)
            yield from self._guard(subject, self._data_set(subject, source))
        for task in tasks.values():
            yield self._task(Subject("task", task.name), task.data)
        plan = self._plan(*(source for source in self.sources if source.opened))
        for entry in self.config.checkpoints:
            subject = Subject("checkpoint", entry.label)
            yield from self._guard(subject, self._checkpoint(subject, entry, plan))
        yield from self._disks(plan)

    def _plan(self, *sources: _Source) -> RunPlan:
        """The plan of a run on these data sets alone."""
        named = tuple(source.entry.path for source in sources if not source.of_suite)
        config = self.config.model_copy(update={"data": named})
        if not config.suite:
            return make_plan(config)
        data = {source.name: source.entry for source in sources if source.of_suite}
        tasks = {
            name: entry.model_copy(update={"data": tuple(one for one in entry.data if one in data)})
            for name, entry in self.suite.tasks.items()
        }
        return make_plan(config, self.suite.model_copy(update={"data": data, "tasks": tasks}))

    def _guard(self, subject: Subject, steps: Iterator[Check]) -> Iterator[Check]:
        """The findings of these steps; an error ends them alone."""
        try:
            yield from steps
        except LmimBenchError as error:
            yield subject.fails("cannot be used", str(error))
        except Exception as error:
            if self.debug:
                raise
            mend = "`lmim-bench --debug doctor ...` shows where; please report it"
            yield subject.fails(f"unexpected {type(error).__name__}: {first_line(error)}", mend)

    def _data_set(self, subject: Subject, source: _Source) -> Iterator[Check]:
        found = layout_of(source.entry)
        source.kind = source.entry.kind or found.kind
        source.entry = source.entry.model_copy(update={"kind": source.kind})
        self._plan(source)
        source.opened = open_data(source.name, source.entry, self.config)
        yield from data_checks(subject, source.opened, found, self.reporter)

    def _task(self, subject: Subject, kind: DataKind) -> Check:
        """Whether a task has data, of those that the suite lists for it where it does."""
        listed = self.suite.tasks.get(subject.name, TaskEntry()).data
        named = [
            source
            for source in self.sources
            if (source.name in listed if listed and source.of_suite else source.kind == kind)
        ]
        for source in named:
            if source.kind not in (kind, None):
                found = f"the suite runs it on {source.name}, a {source.kind} set"
                return subject.fails(found, f"it needs {kind} data; remove {source.name} from its `data`")
        if usable := [source.name for source in named if source.opened]:
            return subject.passes(f"runs on {', '.join(usable)}")
        if named:
            names = ", ".join(source.name for source in named)
            return subject.fails(f"its {kind} data cannot be used", f"see {names} above")
        wanted = "; or ".join(layout.holds for layout in LAYOUTS.values() if layout.kind == kind)
        found = f"no {kind} data is named: it would run on the embedded scenes, which are no benchmark"
        return subject.warns(found, f"add --data DIR with {wanted}")

    def _checkpoint(self, subject: Subject, entry: CheckpointConfig, plan: RunPlan) -> Iterator[Check]:
        encoder = load_encoder(entry.reference)
        spec, info = encoder.spec, encoder.info
        pooled = f"{spec.pooling} {'with' if spec.final_norm else 'without'} the final norm"
        yield subject.passes(f"{info.format}, {info.parameters:,} parameters, evaluated by {pooled}")
        yield _coverage(subject, info)
        for warning in warnings_in(info.notes):
            found, _, mend = warning.partition("; ")
            yield subject.warns(found, mend or "`lmim-bench inspect` shows all that was found out")
        for other in self.records.values():
            if other.fingerprint == encoder.fingerprint:
                yield subject.warns(f"holds the same weights as {other.label}", "leave one of the two out")
        record = CheckpointRecord(
            label=entry.label,
            reference=entry.reference,
            fingerprint=encoder.fingerprint,
            spec=spec,
            info=info,
        )
        self.records[entry.label] = record
        engine = Engine(encoder, self._device(), "fp32", None)
        yield _features(subject, engine)
        for task in {e.task.name: e.task for e in plan.evaluations}.values():
            try:
                reason = left_out_because(task, entry.reference)
            except LmimBenchError as error:
                reason = str(error)
                yield subject.fails(f"{task.name} cannot be scored", reason)
            else:
                if reason is not None:
                    yield subject.passes(f"{task.name} will be left out: {reason}")
            if reason is not None:
                self.left_out.add((entry.label, task.name))
        yield from self._fits(subject, engine, plan, record)

    def _fits(
        self, subject: Subject, engine: Engine, plan: RunPlan, record: CheckpointRecord
    ) -> Iterator[Check]:
        """Whether the encoder has the features that each task reads, and takes images of the size."""
        sizes: set[int] = set()
        for cell, data in self._cells(plan, record):
            try:
                for request in requests_of(cell, record.spec, data):
                    if request.view.size not in sizes:
                        _encode_blank(engine, request.view.size)
                        sizes.add(request.view.size)
            except LmimBenchError as error:
                found = f"{cell.evaluation.task.name} on {cell.evaluation.data} cannot be scored"
                yield subject.fails(found, str(error))
        if sizes:
            yield subject.passes(
                f"encodes the sizes of its tasks: {', '.join(map(str, sorted(sizes)))} pixels"
            )

    def _cells(self, plan: RunPlan, record: CheckpointRecord) -> Iterator[tuple[Cell, Dataset]]:
        """The cells of a checkpoint on the data sets that could be opened, without the tasks left out."""
        for evaluation in plan.evaluations:
            entry, task = plan.data[evaluation.data], evaluation.task
            if entry.kind != task.data or (record.label, task.name) in self.left_out:
                continue
            name = cell_id(record.label, task.name, evaluation.data, 0)
            for source in self.sources:
                if source.entry == entry and source.opened:
                    cell = Cell(id=name, checkpoint=record, evaluation=evaluation, seed=0, digest="")
                    yield cell, source.opened

    def _device(self) -> str:
        with suppress(ConfigError):  # a device that is not there has its own line
            return resolve_device(self.config.device)
        return "cpu"

    def _disks(self, plan: RunPlan) -> Iterator[Check]:
        features = sum(self._feature_bytes(plan, record) for record in self.records.values()) / GB
        cache, out = cache_folder(self.config.cache_dir), run_folder(self.config)
        yield room("--cache-dir", cache, features, f"{features:.1f} GB of features")
        shared = features if existing(cache).stat().st_dev == existing(out).stat().st_dev else 0.0
        yield room("--out", out, _OUT_GB + shared, "results and pictures")

    def _feature_bytes(self, plan: RunPlan, record: CheckpointRecord) -> int:
        """What the feature cache takes for a checkpoint where nothing is in it yet."""
        groups: dict[str, tuple[Dataset, list[Cell]]] = {}
        for cell, data in self._cells(plan, record):
            groups.setdefault(cell.evaluation.data, (data, []))[1].append(cell)
        return sum(
            4 * len(data.splits[split]) * sum(column.numbers(view, record.spec) for column in columns)
            for data, cells in groups.values()
            for (split, view), columns in wanted_by(cells, record.spec, data).items()
        )


def _coverage(subject: Subject, info: CheckpointInfo) -> Check:
    if not info.encoder_tensors:
        return subject.passes("has no tensors to fill")
    filled = f"{info.loaded_tensors} of {info.encoder_tensors} tensors of the encoder are filled"
    if info.random_weights:
        mend = "give a checkpoint file, or timm:NAME:pretrained for timm's own weights"
        return subject.warns(f"random weights: {filled}", mend)
    if info.loaded_tensors != info.encoder_tensors:
        return subject.fails(filled, "give the whole checkpoint: what is not filled is random")
    dropped = f"; {len(info.dropped)} entries of the file are left out" if info.dropped else ""
    return subject.passes(f"{filled}{dropped}")


def _features(subject: Subject, engine: Engine) -> Check:
    """Encode two generated pictures: what comes out is finite, and depends on the picture and the place."""
    import torch

    from .data.scenes import classification_scene, generator
    from .data.views import apply_view

    spec = engine.encoder.spec
    tap, view = Tap(-1, spec.final_norm), View.crop(spec)
    pictures = [classification_scene(generator(0, "doctor", i), i)[0] for i in range(2)]
    images = torch.stack([apply_view(picture, view) for picture in pictures])
    found = engine.encode(images, (tap,))[tap]
    pooled = found.cls if spec.pooling == "cls" and found.cls is not None else found.mean
    if not bool(torch.isfinite(pooled).all()):
        return subject.fails("features are not finite", "the training diverged, or the file broke")
    if _spread(pooled) < _SAME:
        mend = "the encoder has collapsed, or was never trained: check its training"
        return subject.warns("two different pictures have the same global feature", mend)
    tokens = found.patches[0].flatten(0, 1)
    if len(tokens) > 1 and _spread(tokens) < _SAME:
        mend = "unsupervised segmentation and video segmentation can tell nothing apart: check its training"
        return subject.warns("all patches of a picture have the same feature", mend)
    return subject.passes(f"features are finite and differ between pictures (on {engine.device}, fp32)")


def _spread(features: torch.Tensor) -> float:
    """How far features (N, D) are from their mean, as a share of their length; 0 where all are zero."""
    length = float(features.norm())
    return float((features - features.mean(dim=0)).norm()) / length if length else 0.0


def _encode_blank(engine: Engine, size: int) -> None:
    import torch

    engine.encode(torch.zeros(1, 3, size, size), (Tap(),))
