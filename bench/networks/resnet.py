"""Residual networks in torchvision's names, of any depth and width, made of torchvision's blocks.

torchvision and timm fix the first convolution at 64 channels; the wide networks of self-supervised papers
(SwAV, VICReg: all widths twice to five times) and those for small images (a 3x3 first convolution, no
pooling) do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from ..errors import CheckpointError
from ..types import Features, Frozen, PosInterpolation
from .network import Network, read_arch


class ResNetArch(Frozen):
    """What decides the shape and the arithmetic of a residual network."""

    builder: Literal["resnet"] = "resnet"
    block: Literal["basic", "bottleneck"] = "bottleneck"
    layers: tuple[int, int, int, int]
    width: int = Field(64, gt=0)
    """Channels after the first convolution, and the planes of the first stage."""
    base_width: int = Field(64, gt=0)
    groups: int = Field(1, gt=0)
    small: bool = False
    """For small images: a 3x3 first convolution of stride 1, and no pooling after it."""
    padding: int = Field(3, ge=0)
    """Of the first convolution."""


def build_resnet(arch: Mapping[str, Any]) -> ResNet:
    """The network that ``arch`` describes. Raises CheckpointError where its numbers do not go together."""
    numbers = read_arch(ResNetArch, arch, "a residual network")
    try:
        return ResNet(numbers)
    except ValueError as error:  # torchvision's blocks have rules of their own
        raise CheckpointError(f"not a residual network: {error}") from error


class ResNet(Network):
    """See the module's docstring. It is read at its last map only: as one block that changes nothing."""

    def __init__(self, arch: ResNetArch) -> None:
        super().__init__()
        block: type[BasicBlock | Bottleneck] = BasicBlock if arch.block == "basic" else Bottleneck
        size, stride = (3, 1) if arch.small else (7, 2)
        self.conv1 = nn.Conv2d(3, arch.width, size, stride=stride, padding=arch.padding, bias=False)
        self.bn1 = nn.BatchNorm2d(arch.width)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.Identity() if arch.small else nn.MaxPool2d(3, stride=2, padding=1)
        before = arch.width
        for i, count in enumerate(arch.layers):
            planes = arch.width * 2**i
            stage = []
            for j in range(count):
                stride = 2 if i and not j else 1
                shortcut = None
                if not j and (stride > 1 or before != planes * block.expansion):
                    after = planes * block.expansion
                    shortcut = nn.Sequential(
                        nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
                    )
                stage.append(block(before, planes, stride, shortcut, arch.groups, arch.base_width))
                before = planes * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.norm = nn.Identity()
        # Beyond one pixel a 3x3 convolution's padding widens the map, by one place after three halvings.
        self.wider = int(arch.small and arch.padding > 1)

    def embed(
        self, images: torch.Tensor, grid: tuple[int, int], method: PosInterpolation
    ) -> tuple[torch.Tensor, None]:
        """The places of the last map, row by row."""
        x = self.pool(self.act(self.bn1(self.conv1(images))))
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return x.flatten(2).transpose(1, 2), None

    def block(self, index: int, tokens: torch.Tensor, context: None) -> torch.Tensor:
        """The tokens as they are."""
        return tokens

    def read(self, tokens: torch.Tensor, grid: tuple[int, int]) -> Features:
        """The map and its mean; a map that is wider than the patches is averaged over each of them."""
        places = tokens.reshape(len(tokens), grid[0] + self.wider, grid[1] + self.wider, -1)
        patches = places
        if self.wider:
            patches = F.adaptive_avg_pool2d(places.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
        return Features(None, patches, places.mean(dim=(1, 2)))
