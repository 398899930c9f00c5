"""Encoders around the image models of transformers that no checkpoint family reads.

The library is optional. It builds the network, and fills it from tensors that this project has read and
checked; code beside a checkpoint never runs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from .backbones import BaseEncoder, Grid
from .errors import CheckpointError, TaskError, first_line
from .random_state import borrowed_state
from .types import CheckpointInfo, EncoderSpec, Features, PosInterpolation, Tap

BUILDER = "transformers"
OLDEST = "5.0"
INSTALL = "pip install 'lmim-bench[transformers]'"
# What could make the library fetch or run something, and what says nothing of the network.
_NOT_THE_NETWORK = {
    "attn_implementation",
    "auto_map",
    "dtype",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "transformers_version",
}
# A wrapper would have timm fetch its network; such folders are read in timm's own names.
_WRAPPERS = ("timm_wrapper", "timm_backbone")
_POOLER = "add_pooling_layer"
_POSITIONS = "interpolate_pos_encoding"
_TABLE = re.compile(r"(?<!relative_)pos(ition)?_embed")
_ITS_OWN: PosInterpolation = "bicubic"
_MOST_PREFIX_TOKENS = 32
_PROBED = ((0.0, 0.4), (0.3, 0.9), (0.6, 0.1), (0.9, 0.7))
"""Places of an image, in shares of its height and width."""


def has_transformers() -> bool:
    """Whether transformers is here, in a version that can be used."""
    try:
        return Version(version("transformers")) >= Version(OLDEST)
    except PackageNotFoundError:
        return False


def image_model(config: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """The class of transformers for a config.json, and its configuration.

    Of a model for images and texts it is the tower for images.

    Returns:
        None where the library is not here, or has no class for it that gives features of one image.

    Raises:
        CheckpointError: the library has such a model, but not with these numbers.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind in _WRAPPERS or not has_transformers():
        return None
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    # The tokens of a detector are those of its boxes.
    if kind not in CONFIG_MAPPING_NAMES or kind in modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
        return None
    try:
        parsed = AutoConfig.for_model(**_network(config))
    except Exception as error:
        raise CheckpointError(f"config.json is none of transformers' {kind}: {first_line(error)}") from error
    parsed = getattr(parsed, "vision_config", None) or parsed
    if type(parsed) not in modeling_auto.MODEL_MAPPING:
        return None
    found = modeling_auto.MODEL_MAPPING[type(parsed)]
    cls = found[0] if isinstance(found, tuple) else found
    return (cls, parsed) if cls.main_input_name == "pixel_values" else None


def _network(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what is not the network's."""
    return {
        key: _network(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _NOT_THE_NETWORK and not key.startswith("_")
    }


def transformers_arch(config: Any, pooler: bool) -> dict[str, Any]:
    """What rebuilds a model: its configuration as JSON, and whether it has an optional pooling."""
    return {"builder": BUILDER, "config": _network(config.to_diff_dict()), "pooler": pooler}


def create_transformers(arch: Mapping[str, Any]) -> Any:
    """The model of ``transformers_arch`` with random weights, and the global random state left as it was.

    Raises:
        CheckpointError: the library is not installed, or does not have the model.
    """
    cls, config = model_of(arch)
    try:
        with borrowed_state():
            return cls(config, **pooling_option(cls, arch))
    except Exception as error:
        raise CheckpointError(f"transformers' {cls.__name__} cannot be built: {first_line(error)}") from error


def model_of(arch: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class and the configuration of ``transformers_arch``; CheckpointError where they are not here."""
    if not has_transformers():
        raise CheckpointError(f"this encoder needs transformers {OLDEST}: {INSTALL}")
    found = image_model(arch["config"])
    if found is None:
        kind = arch["config"].get("model_type")
        raise CheckpointError(f"transformers {version('transformers')} has no image model {kind!r}")
    return found


def takes_pooler(cls: Any) -> bool:
    """Whether a class of transformers can be built with its pooling or without."""
    return _POOLER in inspect.signature(cls.__init__).parameters


def pooling_option(cls: Any, arch: Mapping[str, Any]) -> dict[str, bool]:
    """What builds a class with its pooling or without."""
    return {_POOLER: bool(arch["pooler"])} if takes_pooler(cls) else {}


def transformers_spec(model: Any, arch: Mapping[str, Any], image_size: int) -> EncoderSpec:
    """The spec of a filled model, for square images of a size.

    Raises:
        CheckpointError: the model gives no map of patch features, or not in the order of the patches.
    """
    layout = _Layout(model.eval(), image_size)
    layout.check_order(model)
    registers = max(0, layout.prefix - 1)
    return EncoderSpec(
        family="transformers",
        arch={**arch, "registers": registers, "probed_at": image_size},
        embed_dim=layout.embed_dim,
        depth=layout.depth,
        patch_size=layout.patch_size,
        image_size=image_size,
        pooling="cls" if layout.has_cls else "mean",
        has_cls=layout.has_cls,
        pos_interpolation=_ITS_OWN,
    )


def own_size(config: Any) -> int | None:
    """The side of the square images that a configuration is made for, or None where it does not say."""
    size = getattr(config, "image_size", None)
    sides = set(size) if isinstance(size, list | tuple) else {size}
    return size if len(sides) == 1 and isinstance(size := sides.pop(), int) and size > 0 else None


class _Layout:
    """How the features of a model of transformers are laid out, found by passes of one image of noise."""

    def __init__(self, model: Any, image_size: int) -> None:
        self.name = type(model).__name__
        self.image_size = image_size
        blocks = _column(model)
        inside = {module for block in blocks for module in block.modules()}
        norms = [m for m in model.modules() if "norm" in type(m).__name__.lower() and m not in inside]
        seen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        with ExitStack() as hooks:
            for module in (*blocks, *norms):
                hooks.enter_context(_listening(module, partial(seen.__setitem__, module), both=True))
            out = self._pass(model, _noise(image_size))
        last = out.last_hidden_state
        self._shape(last, getattr(model.config, "patch_size", None))
        after = [seen[b][1] for b in blocks if b in seen]
        columnar = bool(after) and len(after) == len(blocks) and all(t.shape == last.shape for t in after)
        self.norm: Any = None
        if columnar and not torch.equal(after[-1], last):
            closing = (m for m in norms if m in seen and torch.equal(seen[m][0], after[-1]))
            self.norm = next((m for m in closing if torch.equal(seen[m][1], last)), None)
            columnar = self.norm is not None
        pooled = getattr(out, "pooler_output", None)
        mean = self.patches(last, self.grid).mean(dim=(1, 2))
        pooled = None if pooled is None else pooled.flatten(1)
        self.pools = (
            pooled is not None
            and pooled.shape == mean.shape
            and not torch.allclose(pooled, mean, rtol=1e-4, atol=1e-5)
        )
        self.has_cls = self.pools or self.prefix > 0
        # Below the last block there is no global token but the class token.
        columnar &= self.prefix > 0 or not self.pools
        self.blocks = blocks if columnar else ()
        self.depth = len(self.blocks) or 1

    def _pass(self, model: Any, images: torch.Tensor) -> Any:
        try:
            with torch.inference_mode():
                out = model(pixel_values=images)
        except Exception as error:
            raise CheckpointError(
                f"{self.name} does not take images of {self.image_size} pixels: {first_line(error)}"
            ) from error
        if not isinstance(getattr(out, "last_hidden_state", None), torch.Tensor):
            raise CheckpointError(f"{self.name} gives no features of patches: it has no last_hidden_state")
        return out

    def _shape(self, last: torch.Tensor, stated: Any) -> None:
        """Take grid, patch size, prefix and width from the last state of one image."""
        self.is_map = last.ndim == 4
        self.channels_last = self.is_map and last.shape[1] == last.shape[2] != last.shape[3]
        size = self.image_size
        if self.is_map:
            side, count = (last.shape[1] if self.channels_last else last.shape[2]), 0
            self.embed_dim = int(last.shape[3] if self.channels_last else last.shape[1])
        elif last.ndim == 3:
            self.embed_dim = int(last.shape[2])
            sides = [size // stated] if isinstance(stated, int) and not size % stated else []
            sides += [s for s in range(int(last.shape[1] ** 0.5), 1, -1) if not size % s]
            fits = ((s, last.shape[1] - s * s) for s in sides)
            side, count = next((fit for fit in fits if 0 <= fit[1] <= _MOST_PREFIX_TOKENS), (0, 0))
        else:
            side = count = 0
        if side < 2 or size % side:
            raise CheckpointError(
                f"{self.name} gives no square map of patches: {tuple(last.shape)} for {size} pixels"
            )
        self.grid: Grid = (side, side)
        self.prefix = count
        self.patch_size = size // side

    def patches(self, state: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The patches (B, h, w, D) of a state. Raises TaskError where it is of another grid."""
        if self.is_map:
            state = state if self.channels_last else state.permute(0, 2, 3, 1)
            found = tuple(state.shape[1:3])
        else:
            found = (state.shape[1] - self.prefix,)
        if found != (grid if self.is_map else (grid[0] * grid[1],)):
            raise TaskError(f"{self.name} gives {found} patches where {grid} are due; use another image size")
        return state if self.is_map else state[:, self.prefix :].reshape(len(state), *grid, -1)

    def check_order(self, model: Any) -> None:
        """See that an image has one set of features, and that a change shows most in its own patch.

        Raises:
            CheckpointError: it does not.
        """
        base = _noise(self.image_size)
        places = [(int(y * self.grid[0]), int(x * self.grid[1])) for y, x in _PROBED]
        first, again = (self._states(model, base) for _ in range(2))
        if not torch.allclose(first, again, rtol=1e-3, atol=1e-4):
            raise CheckpointError(
                f"{self.name} gives other features of the same image each time: does it mask patches?"
            )
        if self.is_map:
            return
        changes = []
        for y, x in places:
            image = base.clone()
            p = self.patch_size
            image[:, :, y * p : (y + 1) * p, x * p : (x + 1) * p] *= -1
            changes.append((self._states(model, image) - first).norm(dim=-1))
        # Some tokens answer to everything; what counts is to which change a token answers most.
        answers = torch.stack(changes)
        answers = answers / (answers.mean(dim=0) + answers.mean()).clamp_min(1e-12)
        hits = sum(int(a.argmax()) == y * self.grid[1] + x for a, (y, x) in zip(answers, places, strict=True))
        if 2 * hits <= len(places):
            raise CheckpointError(
                f"the features of {self.name} are not in the order of its patches, so far as can be seen"
            )

    def _states(self, model: Any, images: torch.Tensor) -> torch.Tensor:
        return self.patches(self._pass(model, images).last_hidden_state, self.grid).flatten(1, 2)[0]


def _noise(size: int) -> torch.Tensor:
    """An image (1, 3, size, size) in which no two places are alike."""
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def _column(model: Any) -> tuple[nn.Module, ...]:
    """The blocks of a transformer, where the model has one list of as many as its configuration says."""
    depth = getattr(model.config, "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return tuple(lists[0]) if len(lists) == 1 else ()


@contextmanager
def _listening(module: nn.Module, keep: Any, *, both: bool = False) -> Iterator[None]:
    """Hand on what a module gives, and with ``both`` what it was given, while this lasts."""

    def hook(module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        if not both:
            keep(out)
        elif given and isinstance(given[0], torch.Tensor) and isinstance(out, torch.Tensor):
            keep((given[0], out))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class TransformersEncoder(BaseEncoder):
    """An ``Encoder`` around an image model of transformers.

    Columns of blocks of one width are read at any block, others at their last state (depth 1). The global
    token is what transformers calls ``pooler_output`` where that is more than the mean of the patches, or
    else the class token. Positions of other sizes are resampled as the library does it.
    """

    def __init__(self, model: Any, spec: EncoderSpec, info: CheckpointInfo) -> None:
        super().__init__(model, spec, info)
        self._layout = _Layout(self.model, spec.arch["probed_at"])
        self._resamples = _POSITIONS in inspect.signature(type(model).forward).parameters
        has_table = any(_TABLE.search(key) for key, _ in model.named_parameters())
        self.positions_of = "transformers" if has_table else None

    def _encode(
        self, images: torch.Tensor, taps: Sequence[Tap], grid: Grid, method: PosInterpolation
    ) -> dict[Tap, Features]:
        layout, name = self._layout, type(self.model).__name__
        native = grid == layout.grid
        if not native and self.positions_of and method != _ITS_OWN:
            raise TaskError(
                f"transformers resamples the positions of {name} by its own rule, for which {_ITS_OWN!r} "
                f"stands; {method!r} is not available"
            )
        states: dict[int, torch.Tensor] = {}
        try:
            with ExitStack() as hooks:
                for layer in {tap.layer for tap in taps if layout.blocks and tap != Tap()}:
                    block = layout.blocks[layer]
                    hooks.enter_context(_listening(block, partial(states.__setitem__, layer)))
                out = self.model(
                    pixel_values=images, **({_POSITIONS: True} if self._resamples and not native else {})
                )
        except (AssertionError, RuntimeError, IndexError, ValueError) as error:
            if native or isinstance(error, torch.OutOfMemoryError):
                raise
            raise TaskError(
                f"{name} cannot take images of {images.shape[-2]}x{images.shape[-1]} pixels, only "
                f"{layout.image_size} squared is sure: {first_line(error)}"
            ) from error
        return {tap: self._features(out, states, tap, grid) for tap in taps}

    def _features(self, out: Any, states: Mapping[int, torch.Tensor], tap: Tap, grid: Grid) -> Features:
        layout = self._layout
        state = states.get(tap.layer) if tap != Tap() else None
        if state is None:
            state = out.last_hidden_state
        elif tap.norm and layout.norm is not None:
            state = layout.norm(state)
        cls = state[:, 0] if layout.prefix else None
        if layout.pools and (tap == Tap() or not layout.blocks):
            cls = out.pooler_output.flatten(1)
        patches = layout.patches(state, grid)
        return Features(cls, patches, patches.mean(dim=(1, 2)))
