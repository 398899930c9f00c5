"""One optimiser step: what the trainer repeats, and what a benchmark times."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.fabric import Fabric

from ..bench.random_state import borrowed_state
from .engine import attention_kernel, compile_parts, make_optimizer, resolve_precision, set_rates
from .model import Fed, MaskedImageModel
from .recipe import Recipe
from .replay import GraphRecorder, Replayed
from .schedules import between, learning_rate, momentum, weight_decay


def initial_model(recipe: Recipe) -> MaskedImageModel:
    """The model before its first step; the global random state is left as it was."""
    with borrowed_state(recipe.seed):
        return MaskedImageModel(recipe)


class Stepper:
    """A model with its optimiser, set up on a device, among its processes, at its precision.

    Attributes:
        model: the plain model; what is saved and looked at.
        optimizer: the plain optimiser.
        compiled: whether blocks and projectors are compiled.
    """

    def __init__(self, recipe: Recipe, fabric: Fabric) -> None:
        self.recipe, self.fabric = recipe, fabric
        self.precision = resolve_precision(recipe.engine, fabric.device.type)
        self.model = initial_model(recipe)
        self.compiled = compile_parts(self.model, recipe.engine, fabric.device)
        self._module = fabric.setup_module(self.model)
        self.optimizer = make_optimizer(self.model, recipe.optim, fused=fabric.device.type == "cuda")
        self._optimizer: Any = fabric.setup_optimizers(self.optimizer)
        self._replayed: Replayed | None = None
        if recipe.engine.cuda_graph:
            self._replayed = Replayed(self.model.parameters(), GraphRecorder(fabric.device))

    def __call__(self, done: float, feed: Iterable[Fed]) -> dict[str, torch.Tensor]:
        """Take a step. The target moves first, as in the official code.

        Args:
            done: share of the training that is done, which sets all schedules.
            feed: the accumulated parts, ``engine.accumulate`` of them, on the device.

        Returns:
            The sums over the parts of the loss and of what it is made of, on the device.
        """
        recipe = self.recipe
        aim = between(recipe.objective.similarity_start, recipe.objective.similarity_end, done, "cosine")
        rate = learning_rate(recipe.optim, recipe.learning_rate, done)
        set_rates(self.optimizer, rate, weight_decay(recipe.optim, done))
        self.model.update_target(momentum(recipe.target, done))
        sums: dict[str, torch.Tensor] = {}
        with attention_kernel(self.fabric.device, self.precision):
            for number, part in enumerate(feed):
                last = number == recipe.engine.accumulate - 1
                with self.fabric.no_backward_sync(self._module, enabled=not last):
                    replayed = self._replayed
                    found = replayed(self._pass, part, aim) if replayed else self._pass(part, aim)
                for name, value in found.items():
                    sums[name] = sums[name] + value if name in sums else value
        if recipe.optim.clip is not None:
            # A norm that is not finite shows in the loss, or is skipped by the scaler of fp16.
            self.fabric.clip_gradients(
                self._module, self._optimizer, max_norm=recipe.optim.clip, error_if_nonfinite=False
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return sums

    def _pass(self, part: Fed, aim: float | torch.Tensor) -> dict[str, torch.Tensor]:
        losses = self._module(part.images, part.offsets, part.masks, aim, part.runs)
        self.fabric.backward(losses.loss / self.recipe.engine.accumulate)
        return {"loss": losses.loss.detach(), **losses.terms}
