"""An encoder that somebody's code made, tried on noise before anything relies on it."""

from __future__ import annotations

import hashlib

import torch

from .errors import CheckpointError, LmimBenchError, first_line
from .types import Encoder, EncoderSpec, Features, Tap

_SAME = 1e-2
"""Features that differ by less, relative to the largest, differ by rounding."""
_MARKED = 6
"""Numbers of each kind of feature that enter the mark, beside mean and deviation."""


def try_encoder(encoder: Encoder, source: str) -> str:
    """Encode two images of noise, and one of them alone, at the encoder's own size.

    It is tried on the CPU; one that cannot run there, on a GPU where there is one.

    Returns:
        A mark of the features, three digits of a few of them: code, settings and files that no state dict
        holds decide what an encoder computes as much as its weights.

    Raises:
        CheckpointError: it cannot encode, its features have other shapes than its spec says, or are not the
            same for an image a second time, or beside another one.
    """
    if not isinstance(encoder.spec, EncoderSpec):
        raise CheckpointError(f"{source}: spec is {type(encoder.spec).__name__}, not an EncoderSpec")
    kinds, alone = (_features(encoder, source, count) for count in (2, 1))
    if not _agree(kinds, alone):
        again = _features(encoder, source, 2)
        why = (
            "depend on the others of its batch; is a batch norm in training mode?"
            if _agree(kinds, again)
            else "differ from pass to pass; is dropout on?"
        )
        raise CheckpointError(f"{source}: the features of an image {why}")
    digest = hashlib.sha256()
    for kind, rows in kinds.items():
        flat = rows.flatten()
        numbers = [flat.mean(), flat.std(), *flat[:: max(1, len(flat) // _MARKED)][:_MARKED]]
        digest.update(f"{kind} {' '.join(f'{float(number):.2e}' for number in numbers)}\n".encode())
    return digest.hexdigest()


def _features(encoder: Encoder, source: str, count: int) -> dict[str, torch.Tensor]:
    """The features of the first images of noise by kind, on the CPU in float32."""
    side = encoder.spec.image_size // encoder.spec.patch_size * encoder.spec.patch_size
    noise = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))[:count]
    failures: list[Exception] = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        try:
            with torch.inference_mode():
                found = encoder.to(device)(noise.to(device), (Tap(),), None)[Tap()]
            if not isinstance(found, Features):
                raise TypeError(f"the features of a tap are {type(found).__name__}, not Features")
            break
        except Exception as error:  # noqa: BLE001 - whatever the code of others raises
            failures.append(error)
        finally:
            encoder.to("cpu")
    else:
        kind = "" if isinstance(failures[0], LmimBenchError) else f"{type(failures[0]).__name__}: "
        raise CheckpointError(
            f"{source} cannot encode images of {side} pixels in float32: {kind}{first_line(failures[0])}"
        ) from failures[0]
    grid, width = side // encoder.spec.patch_size, encoder.spec.embed_dim
    expected = {"patches": (count, grid, grid, width), "mean": (count, width)}
    if encoder.spec.has_cls:
        expected["cls"] = (count, width)
    given = {kind: getattr(found, kind) for kind in expected}
    for kind, shape in expected.items():
        if not isinstance(given[kind], torch.Tensor) or tuple(given[kind].shape) != shape:
            got = tuple(getattr(given[kind], "shape", ())) or type(given[kind]).__name__
            raise CheckpointError(f"{source} gave {kind} of shape {got}, expected {shape}")
    return {kind: rows.detach().cpu().float() for kind, rows in given.items()}


def _agree(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether the features of the first image are the same but for rounding; NaN is told where it matters."""
    return all(
        torch.allclose(
            rows[:1],
            second[kind][:1],
            rtol=0,
            atol=_SAME * float(rows[:1].abs().nan_to_num().max()),
            equal_nan=True,
        )
        for kind, rows in first.items()
    )
