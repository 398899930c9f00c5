"""What a network of this project offers to the encoder around it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import nn

from ..errors import CheckpointError, first_problem
from ..types import Features, Frozen, PosInterpolation

Arch = TypeVar("Arch", bound=Frozen)


def read_arch(model: type[Arch], fields: Mapping[str, Any], what: str) -> Arch:
    """The fields of a spec's ``arch`` as the model that declares them.

    Raises:
        CheckpointError: a field is unknown, missing or not valid, or the numbers do not go together.
    """
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        raise CheckpointError(f"not {what}: {first_problem(error)}") from error


class Network(nn.Module, ABC):
    """A column of transformer blocks of one width, whose parts an encoder calls one by one.

    ``norm`` is the final norm of all tokens (``nn.Identity`` where there is none), ``blocks`` the blocks.
    """

    norm: nn.Module
    blocks: nn.ModuleList
    n_prefix: int = 0
    """Number of tokens before those of the patches."""

    @abstractmethod
    def embed(
        self, images: torch.Tensor, grid: tuple[int, int], method: PosInterpolation
    ) -> tuple[torch.Tensor, Any]:
        """Tokens (B, prefix + h*w, D) of images (B, 3, H, W), and what every block is given beside them.

        The patches are in rows, ``grid`` is (h, w), ``method`` says how position tables are resampled.
        """

    @abstractmethod
    def block(self, index: int, tokens: torch.Tensor, context: Any) -> torch.Tensor:
        """The tokens after block ``index``; ``context`` is what ``embed`` gave."""

    def global_token(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The global token (B, D) of tokens after the final norm, or None where the family has none."""
        return None

    def norm_of_mean(self, mean: torch.Tensor) -> torch.Tensor:
        """The family's own norm of the mean of the patches (B, D), where it has one."""
        return mean

    def read(self, tokens: torch.Tensor, grid: tuple[int, int]) -> Features:
        """Features of the tokens of a block, after the final norm where that is asked for."""
        body = tokens[:, self.n_prefix :]
        return Features(self.global_token(tokens), body.reshape(len(body), *grid, -1), body.mean(dim=1))
