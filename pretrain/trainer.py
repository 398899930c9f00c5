"""The training loop: steps, looks and saves on the way, and how it stops and goes on."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from ..bench.atomic import remove_unfinished, write_json
from ..bench.cache import cache_folder
from ..bench.checkpoints import save_checkpoint
from ..bench.claims import claim
from ..bench.data.workers import MORE_SHARED_MEMORY, decoding_workers, workers_that_fit
from ..bench.environment import environment
from ..bench.errors import ConfigError, NotFiniteError, TrainingError, first_line
from ..bench.progress import Reporter
from ..bench.types import Dataset
from .account import Account
from .batches import Part, Schedule, part_bytes, parts, plan_steps, to_images
from .engine import make_fabric
from .intact import without_broken
from .logbook import Logbook, Tally
from .model import Fed
from .monitor import Watcher
from .outcome import Summary, Training, read_summary, start_training
from .pixels import open_pixels
from .recipe import Recipe
from .schedules import learning_rate, milestones, momentum
from .signals import stop_signals
from .state import read_state, restore, snapshot, states, whole_weights, write_state
from .step import Stepper

STATE_VERSION = 1
_DIVERGED = (
    "Start anew with a lower optim.base_lr or with optim.clip; --resume can only change engine.precision, "
    "to fp32 where 16 bit was too coarse"
)
_MOST_STEPS, _MOST_SECONDS = 10, 2.0
"""Between agreements of several processes on whether they were told to stop: torchrun waits half a minute
before it kills, and an agreement waits for the device.
"""


def train(
    training: Training,
    data: Dataset,
    out: Path,
    reporter: Reporter,
    cache_dir: Path | None = None,
    begin: bool = False,
) -> Summary:
    """Train, or go on where the folder's last state is, until the schedule ends or a signal comes.

    SIGTERM and Ctrl-C end the step at hand, save, and return a summary that is not ``finished``; where they
    end the compiler inside a step, it is that of the last state. A training that is finished already is left
    alone, and the summary is the one in its folder.

    Args:
        training: recipe and data, from ``start_training`` or ``read_training``.
        data: the opened data set; only its training split is trained on.
        out: the training's folder.
        reporter: receives progress and news, on the first process.
        cache_dir: where decoded images are kept.
        begin: the folder is to hold no training yet; its ``recipe.json`` is written.

    Raises:
        ConfigError: settings that do not go with the data or the machine, another data set than before,
            another process that writes into the folder, or a folder that already holds a training.
        DataError: a broken image (unless ``engine.skip_broken``).
        CheckpointError: no readable state, or one of another recipe.
        TrainingError: the loss is not finite, or the GPU has no room; the message names the last state.
    """
    if data.fingerprint != training.fingerprint:
        raise ConfigError(
            f"{out} is a training on another content of {training.data}: --data must name the images that it "
            "began with, or train anew with another --out"
        )
    if training.recipe.engine.threads:
        torch.set_num_threads(training.recipe.engine.threads)
    fabric = make_fabric(training.recipe.engine)
    fabric.launch()
    schedule = plan_steps(training.recipe, len(data.splits[data.train_split]), fabric.world_size)
    with claim(out) if fabric.is_global_zero else nullcontext():
        if fabric.is_global_zero:  # inside the claim: another training may be running there
            if begin:
                start_training(training, out)
            for folder in (out, out / "states", out / "encoders"):
                remove_unfinished(folder)
        try:
            return _Run(training, data, schedule, out, reporter, fabric, cache_dir).go()
        except torch.OutOfMemoryError:
            raise TrainingError(
                f"{fabric.device} has no room for this training; {_less_memory(training.recipe)}; "
                f"{_last_state(next((path for path, _ in states(out / 'states')), None))}"
            ) from None


def _less_memory(recipe: Recipe) -> str:
    """What makes a training fit, those first that change nothing in what is learned."""
    engine, compares = recipe.engine, ", which changes what is learned by this recipe"
    mends = {
        "leave out engine.cuda_graph": engine.cuda_graph,
        "set engine.activation_checkpointing=true": not engine.activation_checkpointing,
        f"cut the batch into more parts (engine.accumulate={2 * engine.accumulate}"
        f"{compares if recipe.over_parts else ''})": True,
        "or train fewer at once there": True,
    }
    return ", ".join(mend for mend, helps in mends.items() if helps)


def _last_state(saved: Path | None) -> str:
    return f"the last state is {saved}" if saved else "nothing was saved before"


def _of_the_compiler(error: RuntimeError) -> bool:
    from torch._dynamo.exc import TorchDynamoException  # only once something is compiled: it takes seconds

    return isinstance(error, TorchDynamoException)


class _Run:
    def __init__(
        self,
        training: Training,
        data: Dataset,
        schedule: Schedule,
        out: Path,
        reporter: Reporter,
        fabric: Fabric,
        cache_dir: Path | None,
    ) -> None:
        self.training, self.recipe, self.out, self.fabric = training, training.recipe, out, fabric
        self.reporter, self.schedule = reporter, schedule
        recipe = self.recipe
        self.workers = decoding_workers(fabric.device.type, recipe.data.workers)
        broken: tuple[str, ...] = ()
        with fabric.rank_zero_first(local=True):
            root = cache_folder(cache_dir) / "pixels"
            if recipe.engine.skip_broken:
                data, broken = without_broken(data, root, self.workers, reporter)
            split = data.splits[data.train_split]
            self.pixels = open_pixels(split, data.fingerprint, recipe, root, self.workers, reporter)
        self.account = Account(recipe, schedule, data.name, broken, fabric.device)
        self.stepper = Stepper(recipe, fabric)
        self.model = self.stepper.model
        self.watcher = (
            Watcher(recipe, data, str(fabric.device), self.stepper.precision)
            if fabric.is_global_zero and recipe.watch.evaluations
            else None
        )
        self.saved: Path | None = None
        self.saved_at = time.monotonic()

    def go(self) -> Summary:
        """All steps that are left."""
        # Until the summary is written: a training that is already stopping is often told so again.
        with stop_signals() as asked:
            return self._go(asked)

    def _go(self, asked: threading.Event) -> Summary:
        begun = time.monotonic()
        before = read_summary(self.out)
        step = self._resume() if states(self.out / "states") else self._begin(before)
        self.agreed_at, self.last_agreement, self.next_agreement = time.monotonic(), step, step + 1
        total = self.schedule.total
        if before is not None and before.finished and step == total:
            if self.fabric.is_global_zero:
                self.reporter.line(f"the training in {self.out} is finished, all {total} steps")
            return before
        if step and self.fabric.is_global_zero:
            self.reporter.line(f"going on at step {step} of {total}")
            self.account.recall(self.out, step)
        saves = milestones(total, self.recipe.watch.checkpoints)
        if step:
            self._export(step, keep=step in saves)  # which a sitting that ended inside a save did not come to
        log = Logbook(self.out, self.recipe.watch.tensorboard, step) if self.fabric.is_global_zero else None
        looks = milestones(total, self.recipe.watch.evaluations)
        feed = parts(
            self.recipe,
            self.schedule,
            self.pixels,
            start=step,
            process=self.fabric.global_rank,
            workers=self._able_workers(),
            pin=self.fabric.device.type == "cuda",
        )
        tally = Tally()
        try:
            with closing(feed), self.reporter.progress(total, f"training {self.recipe.name}") as bar:
                bar.advance(step)
                if step == 0:
                    self._look(0, log)
                while step < total:
                    try:
                        self._step(step, feed, tally)
                    except RuntimeError as error:
                        if not (asked.is_set() and self.fabric.world_size == 1 and _of_the_compiler(error)):
                            raise
                        # The signal may have gone to the processes that compile as well. The target has
                        # moved already, so that this step is in no state to be saved.
                        step = self._back_to_last_state(error)
                        break
                    step += 1
                    bar.advance()
                    mark = time.monotonic()
                    stop, overdue = self._agree(asked, step)
                    tally.await_device(time.monotonic() - mark)
                    save = step in saves or stop or overdue
                    due = step % self.recipe.watch.log_every == 0
                    if due or step in looks or save or step == total:
                        self._log(step, tally, log)
                    if step in looks:
                        self._look(step, log)
                    if save:
                        self._save(step, keep_encoder=step in saves)
                    if stop:
                        break
        finally:
            if log is not None:
                log.close()
        earlier = before.seconds if before is not None else 0.0
        summary = self.account.summary(step, tally, earlier + time.monotonic() - begun)
        if self.fabric.is_global_zero:
            write_json(self.out / "summary.json", {**asdict(summary), **self._circumstances()})
        return summary

    def _able_workers(self) -> int:
        """The decoding processes for whose parts the shared memory has room."""
        able = workers_that_fit(self.workers, part_bytes(self.recipe, self.schedule, self.pixels))
        if able < self.workers:
            self.reporter.line(
                f"shared memory has room for {able} of {self.workers} decoding processes; "
                f"{MORE_SHARED_MEMORY}"
            )
        return able

    def _step(self, step: int, feed: Iterator[Part], tally: Tally) -> None:
        """One optimiser step, timed."""
        begun = time.monotonic()
        waited = 0.0

        def fed() -> Iterator[Fed]:
            nonlocal waited
            for _ in range(self.schedule.parts):
                mark = time.monotonic()
                part = next(feed).to(self.fabric.device)
                waited += time.monotonic() - mark
                yield Fed(to_images(part, self.recipe), part.offsets, part.masks, part.runs)

        tally.add(self.stepper(step / self.schedule.total, fed()))
        tally.close_step(time.monotonic() - begun, waited)

    def _log(self, step: int, tally: Tally, log: Logbook | None) -> None:
        """Read the sums, which waits for the device; a loss that is not finite ends the training here."""
        if not tally.steps:
            return
        mark = time.monotonic()
        names = list(tally.sums)
        sums = torch.stack([tally.sums[name].float() for name in names])
        reduced: Any = self.fabric.all_reduce(sums, reduce_op="mean")
        means = reduced.cpu() / (tally.steps * self.schedule.parts)
        tally.await_device(time.monotonic() - mark)
        values = dict(zip(names, means.tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            raise TrainingError(
                f"the loss is {values['loss']} between steps {step - tally.steps + 1} and {step}; "
                f"{_last_state(self.saved)}. {_DIVERGED}"
            )
        self.account.loss = values["loss"]
        done = (step - 1) / self.schedule.total
        speed = tally.steps * self.schedule.batch / tally.busy
        values |= {
            "epoch": step / self.schedule.per_epoch,
            "learning_rate": learning_rate(self.recipe.optim, self.recipe.learning_rate, done),
            "images_per_second": speed,
            "waiting": tally.waited / tally.busy,
            "flops_per_second": speed * self.account.flops,
        }
        if self.recipe.target.kind == "ema":
            values["momentum"] = momentum(self.recipe.target, done)
        utilisation = self.account.utilisation(speed)
        if utilisation is not None:
            values["utilisation"] = utilisation
        if log is not None:
            log.write(step, values)
        tally.clear()

    def _look(self, step: int, log: Logbook | None) -> None:
        """k-NN and the collapse monitor, on the first process."""
        if not self.recipe.watch.evaluations:
            return
        exported = self.model.exported
        encoder, projector = whole_weights(exported.vit), whole_weights(exported.projector)
        if self.watcher is None or log is None:
            return
        account, before = self.account, self.account.warnings if step else ()
        try:
            account.health, account.knn = self.watcher(encoder, projector)
        except NotFiniteError as error:
            raise TrainingError(
                f"the encoder's features are not finite after step {step}; {_last_state(self.saved)}. "
                f"{_DIVERGED}"
            ) from error
        values = {f"health/{name}": value for name, value in asdict(account.health).items()}
        news = f"step {step}: cosine of different images {account.health.projected_cosine:.3f}"
        if account.knn is not None:
            values["knn"] = account.knn
            news += f", k-NN {100 * account.knn:.1f}%"
        log.write(step, values)
        self.reporter.line(news)
        for warning in account.warnings:
            if step and warning.split(":")[0] not in {old.split(":")[0] for old in before}:
                self.reporter.line(f"WARNING: {warning}")

    def _save(self, step: int, keep_encoder: bool) -> None:
        """The state, then the encoder: whatever ends a save, what is there can be gone on from."""
        content = snapshot(self.model, self.stepper.optimizer)
        scaler = self.fabric.strategy.precision.state_dict()
        if self.fabric.is_global_zero:
            state = {
                **content,
                "scaler": scaler,
                "step": step,
                "version": STATE_VERSION,
                "seed": self.recipe.seed,
            }
            self.saved = write_state(self.out / "states", step, state, self.recipe.watch.keep)
        self._export(step, keep_encoder)
        self.fabric.barrier()
        self.saved_at = time.monotonic()

    def _export(self, step: int, keep: bool) -> None:
        """``encoder.pth``, and with ``keep`` the one of this step where the recipe keeps them."""
        encoder = whole_weights(self.model.exported.vit)
        if not self.fabric.is_global_zero:
            return
        facts = self.account.facts(step)
        if self.recipe.watch.keep_encoders and keep:
            save_checkpoint(
                self.out / "encoders" / f"step-{step:08d}.pth", self.recipe.spec(), encoder, facts
            )
        save_checkpoint(self.out / "encoder.pth", self.recipe.spec(), encoder, facts)

    def _begin(self, before: Summary | None) -> int:
        """The first step, unless a sitting saved something whose state is gone: that must not be lost too.

        Raises:
            ConfigError: a training that is not finished, without the state to go on from.
        """
        if before is not None and before.finished:
            return before.step
        if (self.out / "encoder.pth").is_file():
            raise ConfigError(
                f"{self.out} holds encoder.pth, and no state in states/ to go on from; put the states back, "
                "or start anew with another --out"
            )
        return 0

    def _resume(self) -> int:
        path, state, broken = read_state(self.out / "states")
        if self.fabric.is_global_zero:
            for line in broken:
                self.reporter.line(f"WARNING: {line}")
        if state.get("version") != STATE_VERSION:
            raise ConfigError(
                f"{path} was written by another version of lmim-bench; start anew with another --out"
            )
        restore(self.model, self.stepper.optimizer, state)
        if state["scaler"]:  # empty unless both sittings are in fp16
            self.fabric.strategy.precision.load_state_dict(state["scaler"])
        self.saved = path
        return int(state["step"])

    def _back_to_last_state(self, error: RuntimeError) -> int:
        """Say that what came after it is lost, forget what was measured then, and return its step."""
        step = next((number for path, number in states(self.out / "states") if path == self.saved), 0)
        self.reporter.line(
            f"told to stop while blocks were being compiled ({first_line(error)}), which cannot be saved; "
            f"{_last_state(self.saved)}"
        )
        self.account.recall(self.out, step)
        return step

    def _agree(self, asked: threading.Event, step: int) -> tuple[bool, bool]:
        """Whether this or any other process was told to stop, and whether the last save is too long ago."""
        now = time.monotonic()
        overdue = now - self.saved_at > 60 * self.recipe.watch.save_minutes
        if self.fabric.world_size == 1:
            return asked.is_set(), overdue
        if step < self.next_agreement:
            return False, False
        flags = torch.tensor([asked.is_set(), overdue, now - self.agreed_at], device=self.fabric.device)
        found: Any = self.fabric.all_reduce(flags, reduce_op="mean")
        told, late, seconds = found.tolist()
        steps = step - self.last_agreement
        # From what all have agreed on, so that all come to the same step.
        ahead = min(_MOST_STEPS, int(_MOST_SECONDS * steps / max(seconds, 1e-9)))
        self.agreed_at, self.last_agreement, self.next_agreement = now, step, step + max(1, ahead)
        return told > 0, late > 0

    def _circumstances(self) -> dict[str, Any]:
        found = environment(str(self.fabric.device), str(self.fabric.strategy.precision.precision))
        return {
            "environment": found.model_dump(mode="json"),
            "processes": self.fabric.world_size,
            "compiled": self.stepper.compiled,
            "broken_images": list(self.account.broken),
            "flops_per_image": self.account.flops,
            "parameters": sum(p.numel() for p in self.model.encoder.vit.parameters()),
        }
