"""Devices, precision and processes, by Lightning Fabric; parameter groups; what the hardware could do."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..bench.config import Precision
from ..bench.engine import resolve_device
from ..bench.errors import ConfigError
from .encoder import PatchEncoder
from .model import MaskedImageModel
from .sections import EngineConfig, OptimConfig

# Dense bf16 matrix throughput, FLOP/s, from NVIDIA's data sheets; the first name inside the device's counts.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


_MIXED: dict[Precision, Any] = {"bf16": "bf16-mixed", "fp16": "16-mixed"}


class Autocast(MixedPrecision):
    """Fabric's autocast, with loss scaling in fp16, but that it leaves the images as they are."""

    def convert_input(self, data: Any) -> Any:
        """The same data. Autocast rounds where it computes, so that pixels that are to be predicted stay in
        fp32, as in the official codes.
        """
        return data

    def unscale_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the loss scale out of the gradients, so that they can be clipped."""
        # Fabric refuses this to fused optimisers. Torch's scaler knows how to take their step afterwards, and
        # other optimisers make it wait for the GPU in every step.
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)


def make_fabric(config: EngineConfig) -> Fabric:
    """Fabric for this process: one device, or its place among those that torchrun started.

    Raises:
        ConfigError: a device that is not there, one GPU for several processes, fp16 with FSDP2, or a pass
            that cannot be recorded.
    """
    # What Fabric says at the level of news is advice on settings that are the recipe's to choose.
    for package in ("fabric", "pytorch"):  # whichever was imported last does the talking
        logging.getLogger(f"lightning.{package}").setLevel(logging.WARNING)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = resolve_device(config.device)
    kind, _, number = device.partition(":")
    if world > 1 and config.device.startswith("cuda:"):
        raise ConfigError(f"engine.device={config.device} names one GPU; with torchrun use cuda or auto")
    precision = resolve_precision(config, kind)
    if precision == "fp16" and config.strategy == "fsdp2":
        raise ConfigError(
            "engine.strategy=fsdp2 has no loss scaling, which engine.precision=fp16 needs; take bf16 or fp32"
        )
    if config.cuda_graph:
        _check_recordable(config, kind, world, precision)
    devices: Any = local if world > 1 or kind == "cpu" else [int(number)]
    return Fabric(
        accelerator=kind,
        devices=devices,
        num_nodes=max(1, world // local),
        strategy=_strategy(config, world),
        plugins=[Autocast(_MIXED[precision], kind)] if precision in _MIXED else [],
    )


def _check_recordable(config: EngineConfig, kind: str, world: int, precision: Precision) -> None:
    reasons = {
        "runs on a CPU": kind == "cpu",
        f"has {world} processes": world > 1,
        "shards its weights (engine.strategy=fsdp2)": config.strategy == "fsdp2",
        f"cuts its batch into parts (engine.accumulate={config.accumulate})": config.accumulate > 1,
        "scales its loss (engine.precision=fp16)": precision == "fp16",
        "computes activations again (engine.activation_checkpointing)": config.activation_checkpointing,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"engine.cuda_graph=true is not for a training that {reason}; leave it out")


def resolve_precision(config: EngineConfig, kind: str) -> Precision:
    """``auto`` is bf16 on a GPU and fp32 on the CPU."""
    if config.precision == "auto":
        return "bf16" if kind == "cuda" else "fp32"
    return config.precision


def _strategy(config: EngineConfig, world: int) -> Any:
    if config.strategy == "fsdp2":
        return ModelParallelStrategy(_shard, data_parallel_size=world, tensor_parallel_size=1)
    if world > 1:
        return DDPStrategy(gradient_as_bucket_view=True)
    return "auto"


def _shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2: each transformer block is a unit, and the rest is one."""
    from torch.distributed.fsdp import fully_shard

    assert isinstance(model, MaskedImageModel)
    data = mesh["data_parallel"]
    for block in all_blocks(model):
        fully_shard(block, mesh=data)
    fully_shard(model, mesh=data)
    return model


def all_blocks(model: MaskedImageModel) -> list[nn.Module]:
    """The transformer blocks of encoder, target and decoder."""
    return [block for e in _encoders(model) for block in e.vit.blocks] + list(model.decoder.blocks)


def _encoders(model: MaskedImageModel) -> list[PatchEncoder]:
    return [e for e in (model.encoder, model.target_encoder) if e is not None]


def compile_parts(model: MaskedImageModel, config: EngineConfig, device: torch.device) -> bool:
    """``torch.compile`` each block (they share their code, so it is compiled once a shape) and projector in
    place, and say whether that is wanted; the EMA and the checkpoint keep seeing the plain modules.
    """
    wanted = config.compile == "on" or (config.compile == "auto" and device.type == "cuda")
    # Online and target encoder see different numbers of patches, which must not make either of them dynamic;
    # only I-JEPA's numbers change from step to step.
    dynamic = None if model.recipe.masking.kind == "multiblock" else False
    if wanted:
        # What earlier trainings of this process compiled counts towards the limit past which nothing more is.
        torch.compiler.reset()
        projectors = [e.projector for e in _encoders(model)] if model.recipe.projector.depth else []
        for part in [*all_blocks(model), *projectors]:
            part.compile(dynamic=dynamic)
    return wanted


def attention_kernel(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Which attention kernels a step may use: torch's choice, but plain matrix products in half precision on
    the CPU, whose fused backward pass takes as long as the rest of the step on a few dozen tokens.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    plain = device.type == "cpu" and precision != "fp32"
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def make_optimizer(model: nn.Module, config: OptimConfig, fused: bool) -> torch.optim.AdamW:
    """AdamW over two groups: matrices, and what has no weight decay (vectors, biases, ``no_decay`` names)."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim > 1 and not any(part in name for part in config.no_decay)
            groups[plain].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[True], "decays": True}, {"params": groups[False], "decays": False}],
        lr=config.base_lr,
        betas=config.betas,
        weight_decay=0.0,
        fused=fused,
    )


def set_rates(optimizer: torch.optim.Optimizer, rate: float, decay: float) -> None:
    """Learning rate and weight decay of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = decay if group["decays"] else 0.0


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 matrix throughput of a GPU, FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)
