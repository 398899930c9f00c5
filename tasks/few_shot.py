"""Few-shot transfer: a handful of labelled images a class, and episodes of N ways and K shots.

Draws (``ncm``, ``logreg``, ``knn`` at ``shots=K``): K train images of every class are drawn, a classifier
is made of them, and the whole test split is classified. A draw shuffles every class once and takes the
first K, so the sets of one draw are nested and accuracies over K are paired. All features have unit
length. The classifiers:
    ``ncm``: nearest class mean by cosine.
    ``logreg``: multinomial logistic regression without a bias at one stated C = 10, for every K: the
        lambda = 0.1 / n of the recipe for DINO (dino issue 121). Nothing is tuned, on test or elsewhere.
    ``knn``: the nearest support images (one by default), vote weighted by exp(similarity / 0.07).
K above the smallest class of train is left out, with a note; at the headline's K a short class gives all
it has instead. The interval (Student's) covers the sampling of draws and of test images. Chance is a random
guess among the classes that train has: uniform (``ncm``), or in proportion to their support images.

Episodes (``episodic@way=5,shot=K``): the usual inductive N-way K-shot test with 15 queries a class, nearest
class mean, on classes of the *test* split, none of which the encoder's head has seen (it has none). Classes
and images are drawn without replacement within an episode, support and queries never overlap. The value is
the mean accuracy over episodes and the interval is over episodes: it says how well the mean over all
possible episodes of this split is known, and not how it would move on other images. Where classes are
small, first queries and then ways are reduced (the id carries the ways in use), with a note; below two
ways it is left out. Chance is 1/way. Without draws (``shots=[]``) episodes stand alone: train is not read,
the classes of test may be novel, none of train, as in mini-ImageNet, and the headline keeps its ways.

Deviations: EASY and PT-MAP run 10,000 episodes, P>M>F 2,000; the default here is 1,000. Transductive
classifiers and the power transform (NaN on signed features) are not offered. ``center`` subtracts the mean
of the train features first (EASY's ``M``, there the mean of base classes); it is off by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from ..bench.errors import TaskError
from ..bench.types import (
    Array,
    Context,
    Dataset,
    EncoderSpec,
    FeatureRequest,
    Measurement,
    Metric,
    Work,
    pooled_columns,
)
from . import task
from ._features import (
    PooledConfig,
    PooledRows,
    labelled,
    once,
    pooled_width,
    require_known_classes,
    require_two_classes,
    stored_rows,
)

Classifier = Literal["ncm", "logreg", "knn"]
_TITLES: Mapping[Classifier, str] = {
    "ncm": "nearest class mean",
    "logreg": "logistic regression",
    "knn": "nearest neighbour",
}


class FewShotConfig(PooledConfig):
    """Protocol of few-shot transfer."""

    shots: tuple[int, ...] = Field(
        (1, 2, 5, 10), description="Train images a class, of nested draws; []: episodes alone."
    )
    draws: int = Field(10, gt=0, description="Support sets drawn for each number of shots.")
    classifiers: tuple[Classifier, ...] = Field(
        ("ncm", "logreg", "knn"), min_length=1, description="What is made of a support set."
    )
    center: bool = Field(False, description="Subtract the mean of all train features before unit length.")
    logreg_c: float = Field(10.0, gt=0, description="logreg: inverse regularisation C, for every K.")
    logreg_tol: float = Field(
        1e-5, gt=0, description="logreg: estimated distance from the minimum, as a share of it."
    )
    logreg_max_iter: int = Field(1000, gt=0, description="logreg: L-BFGS iterations.")
    knn_k: int = Field(1, gt=0, description="knn: neighbours that vote, at most the support set.")
    temperature: float = Field(0.07, gt=0, description="knn: T of the vote's weight exp(similarity / T).")
    way: int = Field(5, ge=2, description="Episodes: classes.")
    episode_shots: tuple[int, ...] = Field((1, 5), description="Episodes: support images a class.")
    queries: int = Field(15, gt=0, description="Episodes: query images a class.")
    episodes: int = Field(1000, ge=0, description="Episodes for each number of shots; 0: none.")

    @field_validator("shots", "episode_shots")
    @classmethod
    def _ascending(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        if shots and min(shots) < 1:
            raise ValueError("every number of shots must be at least 1")
        return tuple(sorted(set(shots)))

    _once = field_validator("classifiers")(once)

    @model_validator(mode="after")
    def _measures_something(self) -> FewShotConfig:
        if not self.shots and not (self.episodes and self.episode_shots):
            raise ValueError("few_shot.shots is empty and there are no episodes: nothing is left to measure")
        return self

    @property
    def headline_shots(self) -> int:
        """5, or the nearest number of shots that is measured (the smaller of two)."""
        return min(self.shots or self.episode_shots, key=lambda k: (abs(k - 5), k))

    @property
    def headline_classifier(self) -> Classifier:
        """Nearest class mean, or the first classifier where it is not asked for."""
        return "ncm" if "ncm" in self.classifiers else self.classifiers[0]


def _headline(cfg: FewShotConfig) -> str:
    if not cfg.shots:
        return f"episodic@way={cfg.way},shot={cfg.headline_shots}"
    return f"{cfg.headline_classifier}@shots={cfg.headline_shots}"


def _features(cfg: FewShotConfig, spec: EncoderSpec, data: Dataset) -> Sequence[FeatureRequest]:
    columns = pooled_columns(cfg.pooled(spec), cfg.tap(spec))
    if cfg.shots:
        require_known_classes(data)
    splits = (data.train_split, data.test_split) if _reads_train(cfg) else (data.test_split,)
    return [FeatureRequest(splits, cfg.view(spec), columns)]


def _reads_train(cfg: FewShotConfig) -> bool:
    return bool(cfg.shots) or cfg.center


def _work(cfg: FewShotConfig, spec: EncoderSpec, data: Dataset) -> Work:
    train, test = (len(data.splits[name]) for name in (data.train_split, data.test_split))
    width, classes = pooled_width(cfg.pooled(spec), spec), max(2, len(data.classes))
    supports = [min(shot * classes, train) for shot in cfg.shots]
    linear, nearest = (name in cfg.classifiers for name in ("logreg", "knn"))
    heads = len(cfg.classifiers) - nearest
    # For logreg: a basis, which the smaller side of a support set decides, and then its steps.
    basis = sum(size * width * min(size, width) for size in supports)
    steps = sum(supports) * width * classes
    likened = cfg.draws * test * (heads * len(supports) * classes + nearest * sum(supports))
    episodes = cfg.episodes * cfg.way * sum(shot + cfg.queries for shot in cfg.episode_shots)
    return Work(
        {
            "start": 0.5,
            "fits": cfg.draws * linear * (0.017 * len(supports) + 1.3e-11 * basis + 9e-10 * steps),
            "products": 2.2e-11 * likened * width,
            "episodes": 1e-9 * episodes * width,
        },
        on_device=("fits",),
        memory=55e6 + 10.0 * test * width + 16.0 * cfg.draws * max(supports, default=0) * width,
    )


@task(
    "few_shot",
    version=5,
    title="Few-shot transfer",
    data="classification",
    config=FewShotConfig,
    metrics=(
        *(Metric(id=name, title=f"{title}, K images a class") for name, title in _TITLES.items()),
        Metric(id="episodic", title="episodes, nearest class mean"),
    ),
    headline=_headline,
    features=_features,
    work=_work,
)
def TASK(ctx: Context, cfg: FewShotConfig) -> Sequence[Measurement]:  # noqa: N802
    """Classify the test split from every draw, then run the episodes inside it."""
    pooling, tap = cfg.pooled(ctx.spec), cfg.tap(ctx.spec)
    test, truth = labelled(ctx, ctx.data.test_split)
    test_rows = stored_rows(test, pooling, tap)
    if not _reads_train(cfg):
        return _episodic(ctx, cfg, _UnitRows(test_rows)[:], truth)
    train, labels = labelled(ctx, ctx.data.train_split)
    train_rows = stored_rows(train, pooling, tap)
    centre = train_rows.mean() if cfg.center else 0.0
    unit_test = _UnitRows(test_rows, centre)[:]
    result = []
    if cfg.shots:
        require_two_classes(ctx, labels, "few-shot transfer")
        # Of train, which may be large, only what is drawn is ever read (and a pass for the mean).
        result = _from_draws(ctx, cfg, (_UnitRows(train_rows, centre), labels), (unit_test, truth))
    return result + _episodic(ctx, cfg, unit_test, truth)


@dataclass(frozen=True)
class _UnitRows:
    """Features at unit length, centred first: ``rows[index]`` reads these alone."""

    pooled: PooledRows
    centre: Array | float = 0.0

    def __getitem__(self, index: Array | slice) -> Array:
        from ._math.normalise import unit_rows

        return unit_rows(self.pooled[index] - self.centre)


def _from_draws(
    ctx: Context, cfg: FewShotConfig, train: tuple[_UnitRows, Array], test: tuple[Array, Array]
) -> list[Measurement]:
    """Every classifier at every number of shots: items (draws, test images)."""
    from ._math.selection import random_rank

    rows, labels = train
    ranks = [random_rank(labels, ctx.rng("draw", draw)) for draw in range(cfg.draws)]
    shots = _possible_shots(ctx, cfg, labels, test[1])
    stopped, result = 0, []
    with ctx.progress(len(shots) * len(cfg.classifiers), "few-shot draws") as bar:
        for shot in shots:
            supports = [(rows[rank < shot], labels[rank < shot]) for rank in ranks]
            for name in cfg.classifiers:
                predicted, failed = _classify(ctx, cfg, name, supports, test[0])
                stopped += failed
                hits = (predicted == test[1]).astype(np.float32)
                spread = float(hits.mean(axis=1).std(ddof=1)) if cfg.draws > 1 else None
                detail = {"draws": cfg.draws, "std_over_draws": spread}
                chance = _chance(name, supports[0][1], test[1])
                result.append(
                    Measurement(f"{name}@shots={shot}", hits, crossed=True, chance=chance, detail=detail)
                )
                bar.advance()
    if stopped:
        ctx.note(f"{stopped} logistic regressions did not converge; raise logreg_max_iter")
    _save_curve(ctx, cfg, shots, result)
    return result


def _chance(name: Classifier, support: Array, truth: Array) -> float:
    """How often a guess is right: of any class of the support set, for ``ncm``; else of one as often as it
    has images there, since votes and regressions follow the numbers where classes give all that they have.
    """
    counts = np.bincount(support, minlength=int(truth.max()) + 1)
    guesses = (counts > 0) if name == "ncm" else counts
    return float((guesses / guesses.sum())[truth].mean())


def _possible_shots(ctx: Context, cfg: FewShotConfig, labels: Array, truth: Array) -> list[int]:
    """The numbers of shots that every class of train has images for, and the headline's in any case."""
    counts = np.bincount(labels, minlength=int(truth.max()) + 1)
    smallest = int(counts[counts > 0].min())
    shots = [k for k in cfg.shots if k <= smallest or k == cfg.headline_shots]
    left_out = [str(k) for k in cfg.shots if k not in shots]
    if left_out:
        ctx.note(f"shots={','.join(left_out)} left out: the smallest class of train has {smallest} images")
    if cfg.headline_shots > smallest:
        short = int(((counts > 0) & (counts < cfg.headline_shots)).sum())
        ctx.note(
            f"WARNING: few-shot, shots={cfg.headline_shots}: {short} classes have fewer train images and "
            f"give all that they have (the smallest {smallest})"
        )
    unseen = int(np.count_nonzero(counts[np.unique(truth)] == 0))
    if unseen:
        ctx.note(f"{unseen} classes of test have no train image and are never predicted")
    return shots


def _classify(
    ctx: Context,
    cfg: FewShotConfig,
    name: Classifier,
    supports: Sequence[tuple[Array, Array]],
    test_rows: Array,
) -> tuple[Array, int]:
    """Predicted classes (draws, N), and how many fits did not converge."""
    from ._math import few_shot, knn
    from ._math.logistic import fit_path

    if name == "ncm":
        known = np.unique(supports[0][1])  # the same classes in every draw
        means = np.stack([few_shot.class_means(rows, labels) for rows, labels in supports])
        return known[few_shot.nearest_mean(test_rows, means)], 0

    predicted = np.empty((len(supports), len(test_rows)), dtype=np.int64)
    failed = 0
    for out, (rows, labels) in zip(predicted, supports, strict=True):
        n_classes = int(labels.max()) + 1
        if name == "logreg":
            (head,) = fit_path(
                rows,
                labels,
                (cfg.logreg_c,),
                n_classes,
                max_iter=cfg.logreg_max_iter,
                tol=cfg.logreg_tol,
                intercept=False,
                device=ctx.device,
            )
            out[:] = head.logits(test_rows).argmax(axis=1)
            failed += not head.converged
        else:
            k = min(cfg.knn_k, len(rows))
            similarity, position = knn.search(rows, test_rows, k, 4096)
            for start in range(0, len(test_rows), 4096):
                block = slice(start, start + 4096)
                weights = knn.exponential_weights(similarity[block], cfg.temperature)
                voters = labels[position[block]]
                out[block] = knn.winner(knn.class_totals(weights, voters, n_classes), voters)
    return predicted, failed


def _save_curve(
    ctx: Context, cfg: FewShotConfig, shots: Sequence[int], measured: Sequence[Measurement]
) -> None:
    """Accuracy over shots with its 95% interval as a band, where there are several draws."""
    from ..bench.stats import crossed_interval

    series: dict[str, dict[str, list[float]]] = {"series": {}, "low": {}, "high": {}}
    for name in cfg.classifiers:
        ours = [m for m in measured if m.metric.split("@")[0] == name]
        values = [float(m.items.mean()) for m in ours]
        ends = [crossed_interval(m.items) or (v, v) for m, v in zip(ours, values, strict=True)]
        for key, numbers in (
            ("series", values),
            ("low", [max(0.0, low) for low, _ in ends]),
            ("high", [min(1.0, high) for _, high in ends]),
        ):
            series[key][_TITLES[name]] = [round(v, 6) for v in numbers]
    axes = {"x_label": "train images a class", "y_label": "accuracy", "log_x": True, "unit": "%"}
    caption = (
        f"Whole test split, mean of {cfg.draws} draws; bands are 95% intervals over draws and test images."
    )
    if cfg.draws == 1:
        series = {"series": series["series"]}
        caption = "Whole test split, one draw."
    ctx.save_data(
        "accuracy-over-shots", "curve", "Accuracy over shots", {"x": list(shots), **series, **axes}, caption
    )


def _episodic(ctx: Context, cfg: FewShotConfig, rows: Array, labels: Array) -> list[Measurement]:
    """N-way K-shot episodes inside the test split: items are its images, by their part in the episodes."""
    from ._math.few_shot import episode_hits, image_terms, plan_episodes, sample_episodes

    result = []
    for shot in cfg.episode_shots if cfg.episodes else ():
        counts = np.bincount(labels)
        plan = plan_episodes(counts, cfg.way, shot, cfg.queries)
        if not cfg.shots and shot == cfg.headline_shots and (plan is None or plan.way < cfg.way):
            enough = int((counts > shot).sum())
            raise TaskError(
                f"episodes of {cfg.way} ways and {shot} shots need {cfg.way} test classes of {shot + 1} "
                f"images; {ctx.data.name} has {enough}"
                + (f": set few_shot.way={enough}" if enough > 1 else "")
            )
        if plan is None:
            ctx.note(f"episodes of {shot} shots left out: fewer than two test classes have {shot + 1} images")
            continue
        if (plan.way, plan.query) != (cfg.way, cfg.queries):
            ctx.note(
                f"episodes of {shot} shots have {plan.way} ways and {plan.query} queries a class: "
                "the test split has no more images"
            )
        picks = sample_episodes(labels, plan, cfg.episodes, ctx.rng("episodes", shot))
        hits = episode_hits(rows, picks, shot)
        accuracy = hits.mean(axis=(1, 2))
        detail = {
            "queries": plan.query,
            "classes": len(plan.classes),
            "episodes": len(accuracy),
            "over_episodes": round(float(1.96 * accuracy.std() / len(accuracy) ** 0.5), 6),
        }
        result.append(
            Measurement(
                f"episodic@way={plan.way},shot={shot}",
                image_terms(hits, picks, len(labels)),
                chance=1 / plan.way,
                bounds=(0.0, 1.0),
                detail=detail,
            )
        )
    return result
