"""A forward and backward pass that a GPU repeats by itself: recorded once as a CUDA graph, then replayed.

A pass of a few hundred small modules is thousands of kernels, and a slow CPU does not start them as fast as
a GPU ends them. Replayed, they are the same kernels on the same memory: the numbers are those of the pass as
it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from .masking import Masks
from .model import Fed

Pass = Callable[[Fed, float | torch.Tensor], dict[str, torch.Tensor]]
"""Forward and backward pass of a part, given the aim of the similarity constraint: gradients are added to
those that are there; the loss and what it is made of are returned, scalars on the device.
"""
_WARM = 3
"""Passes before the recorded one, in which all is made that is made once: compiled code, workspaces."""


class Recorder(Protocol):
    """How work on a device is recorded."""

    def warm(self, work: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Do it, so that it can be recorded later."""

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """What the work returns, which is not computed yet, and what computes it, again and again."""


class GraphRecorder:
    """By CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        stream: Any = torch.cuda.Stream
        self._stream = stream(device)

    def warm(self, work: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)  # as torch asks for: gradients know the stream that they came from
        with torch.cuda.stream(self._stream):
            found = work()
        current.wait_stream(self._stream)
        return found

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # The thread that pins the next batch allocates memory meanwhile, which would end a recording of all.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            found = work()
        return found, graph.replay


class Replayed:
    """The passes of a training, parts of one shape. Gradients are those of one pass: they must be gone (None)
    when the next one begins.

    Args:
        parameters: what gets gradients.
        recorder: how passes are recorded.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], recorder: Recorder) -> None:
        self._recorder, self._parameters = recorder, list(parameters)
        self._calls = 0
        self._replay: Callable[[], None] | None = None
        self._inputs: list[torch.Tensor] = []
        self._gradients: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._names: list[str] = []
        self._values = torch.empty(0)

    def __call__(self, work: Pass, part: Fed, aim: float) -> dict[str, torch.Tensor]:
        """What the pass returns. ``work`` is always the same one; nothing in it may wait for the device."""
        if self._calls < _WARM:
            self._calls += 1
            return self._recorder.warm(lambda: work(part, aim))
        given = [*_tensors(part), torch.full((), aim, device=part.images.device)]
        if self._replay is None:
            self._replay = self._record(work, part, given)
        for kept, x in zip(self._inputs, given, strict=True):
            kept.copy_(x)
        self._replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return dict(zip(self._names, self._values.clone().unbind(), strict=True))

    def _record(self, work: Pass, part: Fed, given: list[torch.Tensor]) -> Callable[[], None]:
        self._inputs = [x.clone() for x in given]
        *tensors, aim = self._inputs
        kept = _like(part, tensors)

        def recorded() -> torch.Tensor:
            found = work(kept, aim)
            self._names = list(found)
            return torch.stack([value.float() for value in found.values()])

        self._values, replay = self._recorder.record(recorded)
        self._gradients = [(p, p.grad) for p in self._parameters if p.grad is not None]
        return replay


def _tensors(part: Fed) -> list[torch.Tensor]:
    return [x for x in (part.images, part.offsets, *part.masks) if x is not None]


def _like(part: Fed, tensors: list[torch.Tensor]) -> Fed:
    """A part of these tensors, which are in the order of ``_tensors``."""
    left = iter(tensors)
    images = next(left)
    return Fed(images, None if part.offsets is None else next(left), Masks(*left))
