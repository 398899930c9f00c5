"""What a training last measured of itself, and what it says so: in its checkpoint and in its summary."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from .batches import Schedule
from .engine import peak_flops
from .flops import training_flops
from .logbook import Tally, read_metrics
from .monitor import Health
from .outcome import Summary
from .recipe import Recipe


@dataclass
class Account:
    """A training's account of itself.

    Attributes:
        recipe, schedule: what is trained, and how its steps are shared out.
        data_name: of the data set.
        broken: ids of the images that are left out.
        device: of this process.
        loss: mean loss of the last line of the log.
        knn: the last online k-NN accuracy, a fraction.
        health: the collapse monitor's last measures.
        flops: of an image.
    """

    recipe: Recipe
    schedule: Schedule
    data_name: str
    broken: tuple[str, ...]
    device: torch.device
    loss: float | None = None
    knn: float | None = None
    health: Health | None = None
    flops: float = field(init=False)

    def __post_init__(self) -> None:
        self.flops = training_flops(self.recipe)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the collapse monitor says."""
        return tuple(self.health.warnings()) if self.health is not None else ()

    def recall(self, out: Path, step: int) -> None:
        """What was measured up to a step, by whichever sitting, and nothing that came later."""
        self.loss = self.knn = self.health = None
        for line in read_metrics(out):
            if line["step"] > step:
                break
            self.loss = line.get("loss", self.loss)
            self.knn = line.get("knn", self.knn)
            health = {f.name: line[f"health/{f.name}"] for f in fields(Health) if f"health/{f.name}" in line}
            if health:
                self.health = Health(**health)

    def facts(self, step: int) -> dict[str, Any]:
        """What the checkpoint of a step says of its training."""
        epochs = step / self.schedule.per_epoch
        notes = [
            f"trained by the recipe {self.recipe.name} on {self.data_name}: {step} of {self.schedule.total} "
            f"steps of {self.schedule.batch} images, {epochs:.3g} epochs, seed {self.recipe.seed}"
        ]
        if self.recipe.target.export == "target":
            notes.append("its target encoder, the moving average of the one that was trained")
        if self.broken:
            notes.append(f"{len(self.broken)} broken image(s) left out, first {self.broken[0]}")
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "data": self.data_name,
            "step": step,
            "epochs": epochs,
            "notes": [*notes, *(f"WARNING: {warning}" for warning in self.warnings)],
        }

    def utilisation(self, images_per_second: float) -> float | None:
        """Share of what the matrix units could do; None where that is not known."""
        peak = peak_flops(self.device)
        return None if peak is None else images_per_second * self.flops / (peak * self.schedule.processes)

    def summary(self, step: int, tally: Tally, seconds: float) -> Summary:
        """What the training has come to, ``seconds`` of all sittings after its begin."""
        busy = tally.all_busy
        speed = tally.all_steps * self.schedule.batch / busy if busy else None
        return Summary(
            finished=step == self.schedule.total,
            step=step,
            steps=self.schedule.total,
            loss=self.loss,
            images_per_second=speed,
            waiting=tally.all_waited / busy if busy else None,
            flops_per_second=speed * self.flops if speed else None,
            utilisation=self.utilisation(speed) if speed else None,
            seconds=seconds,
            health=None if self.health is None else asdict(self.health),
            knn=self.knn,
            warnings=self.warnings,
        )
