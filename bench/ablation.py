"""Studies of pretraining: train every row alike, score all, end in one report and one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..pretrain.api import open_images
from ..pretrain.batches import plan_steps
from ..pretrain.intact import without_broken
from ..pretrain.pixels import longest_side
from ..pretrain.recipe import Recipe, changed_fields, idle_fields
from ..pretrain.studies import (
    SCALES,
    Budget,
    Row,
    Study,
    idle_reason,
    load_study,
    refuse_overruled,
    row_recipe,
    study_names,
)
from .api import run
from .atomic import atomic_write
from .cache import cache_folder
from .config import CheckpointConfig, RunConfig
from .data.workers import decoding_workers
from .engine import resolve_device
from .errors import ConfigError
from .plan import make_plan
from .progress import Reporter
from .results import Result, RunFile, read_results
from .trainings import PlannedRow, Trainer, plan_row, training_precision
from .types import Dataset

TASKS = ("knn", "linear", "few_shot")
_POOLED = {
    "mean": "mean of the patch tokens",
    "cls": "class token",
    "cls+mean": "class token and mean of the patch tokens",
}


def run_studies(
    names: Sequence[str],
    reference: str,
    budget: Budget,
    out: Path,
    *,
    sets: Sequence[str] = (),
    device: str = "auto",
    jobs: int = 1,
    skip_broken: bool = False,
    cache_dir: Path | None = None,
    reporter: Reporter | None = None,
    command: str = "lmim_bench.bench.ablation.run_studies(...)",
) -> dict[str, RunFile]:
    """Train and score studies; ``out/<study>/report.html`` and ``table.md`` compare the rows of each.

    A row that several studies share is trained once, and one that could not differ from the others of its
    study is left out. Finished trainings are kept and interrupted ones go on.

    Args:
        names: studies, or ``all``.
        reference: classification data, trained and scored on.
        budget: what is spent on each row.
        out: where everything is kept.
        sets: changes of every recipe.
        device: where to train and score.
        jobs: trainings at a time, see ``Trainer.train_all``.
        skip_broken: train with another image in the place of each broken one, score without them.
        cache_dir: decoded images and features.
        reporter: where progress goes.
        command: recorded in the results.

    Raises:
        LmimBenchError: a study, data set, recipe or folder that cannot be used.
        KeyboardInterrupt: a training was told to stop; it is saved.
    """
    if "engine.skip_broken" in changed_fields(sets):
        raise ConfigError("--set engine.skip_broken: say --skip-broken, as the rows are scored too")
    reporter = reporter or Reporter()
    studies = [load_study(name) for name in (study_names() if "all" in names else dict.fromkeys(names))]
    data = open_images(reference, reporter, cache_dir)
    if data.train_split == data.test_split:
        raise ConfigError(f"{reference} has no labelled train and test split to score the rows on")
    if skip_broken:
        root, sets = cache_folder(cache_dir) / "pixels", (*sets, "engine.skip_broken=true")
        data, _ = without_broken(data, root, decoding_workers(resolve_device(device)), reporter)
    side = longest_side(data.splits[data.train_split])
    for study in studies:
        refuse_overruled(study, SCALES[budget], side, sets)
    recipes = {
        study.name: [(row, row_recipe(row, SCALES[budget], side, sets, device)) for row in study.rows]
        for study in studies
    }
    plans = {name: _plan(name, rows, data, out, reporter) for name, rows in recipes.items()}
    for line in _idle_everywhere(
        [recipe for rows in recipes.values() for row, recipe in rows if row.recipe], sets
    ):
        reporter.line(f"WARNING: {line}")
    for recipe in {t.folder: t.recipe for plan in plans.values() for t in plan}.values():
        plan_steps(recipe, len(data.splits[data.train_split]), processes=1)
    scorings = {
        name: RunConfig(
            checkpoints=tuple(
                CheckpointConfig(label=t.row.label, reference=str(t.folder / "encoder.pth")) for t in plan
            ),
            tasks=TASKS,
            data=(reference,),
            out=out / name,
            limit=SCALES[budget].limit,
            device=device,
            cache_dir=cache_dir,
            skip_broken=skip_broken,
        )
        for name, plan in plans.items()
    }
    (name,) = {name for scoring in scorings.values() for name in make_plan(scoring).data}
    for scoring in scorings.values():
        _refuse_other_trainings(scoring, name)
    trainer = Trainer(data, reference, cache_dir, command)
    trainer.train_all([trained for plan in plans.values() for trained in plan], reporter, jobs)
    finished = {}
    for study in studies:
        found = run(config=scorings[study.name], reporter=reporter, command=command)
        # The folder may hold the scores of an earlier study of the same name on other data.
        found = found.model_copy(update={"results": tuple(r for r in found.results if r.data.name == name)})
        table = study_table(study, plans[study.name], found, command)
        with atomic_write(out / study.name / "table.md") as stream:
            stream.write(table)
        click.echo(f"{table}\ntable    {out / study.name / 'table.md'}")
        click.echo(f"report   {out / study.name / 'report.html'}")
        finished[study.name] = found
    return finished


def _refuse_other_trainings(scoring: RunConfig, data: str) -> None:
    """Before anything is trained: the folder's scores on these data must be those of the same trainings.

    Raises:
        ConfigError: a row was scored from another training, which its recipe and data name.
    """
    assert scoring.out is not None
    trainings = {c.label: Path(c.reference).parent.name for c in scoring.checkpoints}
    for result in read_results(scoring.out):
        label, training = result.checkpoint.label, Path(result.checkpoint.reference).parent.name
        if result.data.name == data and trainings.get(label, training) != training:
            raise ConfigError(
                f"{scoring.out} holds the scores of {label!r} trained otherwise ({training}, not "
                f"{trainings[label]}): other --set, --budget or images; give another --out"
            )


def _plan(
    study: str, rows: Sequence[tuple[Row, Recipe]], data: Dataset, out: Path, reporter: Reporter
) -> list[PlannedRow]:
    """The rows of a study that are trained; a line for each that could not differ from the others."""
    plan: list[PlannedRow] = []
    known: dict[Path, str] = {}
    for row, recipe in rows:
        planned = plan_row(row, recipe, data, out)
        reason = idle_reason(row, recipe)
        if reason is None and planned.folder in known:
            reason = f"at this size it is the same training as {known[planned.folder]!r}"
        if reason is not None:
            reporter.line(f"{study}: the row {row.label!r} is left out: {reason}")
            continue
        known[planned.folder] = row.label
        plan.append(planned)
    return plan


def _idle_everywhere(recipes: Sequence[Recipe], sets: Sequence[str]) -> list[str]:
    """The changes that change no row, a sentence each."""
    idle = [idle_fields(recipe) for recipe in recipes]
    names = [name for name in changed_fields(sets) if idle and all(name in one for one in idle)]
    return [f"{name} changes nothing in any row: {idle[0][name]}" for name in names]


def study_table(study: Study, plan: Sequence[PlannedRow], found: RunFile, command: str) -> str:
    """The scores of a study with their intervals and the collapse monitor's measures, as Markdown with the
    circumstances under it.
    """
    results = {(r.checkpoint.label, r.task): r for r in found.results}
    heads = {task: next(r for r in found.results if r.task == task) for task in TASKS}
    titles = [f"{heads[task].task_title}, {heads[task].headline}" for task in TASKS]
    lines = [
        f"**{study.name}**: {study.about}",
        "",
        "| " + " | ".join(["row", *titles, "cosine of different images, projected", "effective rank"]) + " |",
        "|---" * (len(titles) + 3) + "|",
    ]
    for row, _, folder in plan:
        health = json.loads((folder / "summary.json").read_bytes())["health"]
        scores = [_score(results[row.label, task]) for task in TASKS]
        measures = ["-", "-"]
        if health is not None:
            measures = [f"{health['projected_cosine']:.2f}", f"{health['effective_rank']:.1f}"]
        lines.append("| " + " | ".join([row.label, *scores, *measures]) + " |")
    return "\n".join([*lines, "", *_circumstances(plan, found, command)]) + "\n"


def _score(result: Result) -> str:
    score = result.score(result.headline)
    if score is None:
        return "failed"
    value = f"{100 * score.value:.1f}"
    if score.low is None or score.high is None:
        return value
    return f"{value} [{100 * score.low:.1f}, {100 * score.high:.1f}]"


def _circumstances(plan: Sequence[PlannedRow], found: RunFile, command: str) -> list[str]:
    recipe = next(t.recipe for t in plan if t.row.recipe)
    result = found.results[0]
    width, depth, heads = recipe.model.shape
    environment = result.environment
    commit = (
        f"{(environment.git_commit or 'no commit')[:7]}{' with changes' if environment.git_dirty else ''}"
    )
    images = ", ".join(f"{name} {n}" for name, n in result.data.counts.items())
    folders = dict.fromkeys(t.folder for t in plan)
    summaries: list[dict[str, Any]] = [json.loads((f / "summary.json").read_bytes()) for f in folders]
    length = f"{recipe.optim.steps} steps" if recipe.optim.steps else f"{recipe.optim.epochs:g} epochs"
    seconds = sum(s.get("seconds", 0.0) for s in summaries)
    devices = dict.fromkeys(s["environment"]["device"] for s in summaries if "environment" in s)
    trained_on = " and ".join(devices) or "-"
    return [
        f"Accuracy in % with 95% intervals, on {result.data.name} ({images} scored). Every row: "
        f"{length} of {recipe.optim.batch_size} images a step, peak learning rate "
        f"{recipe.learning_rate:.3g}, encoder of width {width}, depth {depth}, {heads} heads, patch "
        f"{recipe.model.patch_size} on {recipe.data.image_size} pixels, "
        f"{_POOLED[recipe.model.pooling]} {'after' if recipe.model.final_norm else 'before'} the "
        f"final norm; seed {recipe.seed}. {seconds / 60:.0f} minutes of training in all on {trained_on}, in "
        f"{training_precision(recipe)}.",
        "",
        f"`{command}`, commit {commit}, lmim-bench {environment.lmim_bench}, torch "
        f"{environment.packages.get('torch', '?')}.",
    ]
