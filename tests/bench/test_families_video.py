"""Encoders of videos: which of the two V-JEPAs wrote a file, whose keys are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import CheckpointError
from lmim_bench.bench.networks import build_network

DIM, HEADS = 48, 2
State = dict[str, torch.Tensor]


def encoder_state() -> State:
    torch.manual_seed(0)
    arch = {"embed_dim": DIM, "depth": 1, "num_heads": HEADS, "patch_size": 4, "hidden": 96}
    state: State = build_network({"builder": "vjepa2", **arch}).state_dict()
    return state


def table(times: int, side: int) -> torch.Tensor:
    """The fixed table of both repositories, with a third of the columns for each axis."""
    frequency = 1 / 10000 ** (torch.arange(DIM // 6) / (DIM / 6))
    axes = torch.meshgrid(torch.arange(times), torch.arange(side), torch.arange(side), indexing="ij")
    angles = [torch.outer(axis.reshape(-1).float(), frequency) for axis in axes]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)[None]


def save(folder: Path, positions: torch.Tensor | None, masks: int | None) -> str:
    state = encoder_state() | ({} if positions is None else {"pos_embed": positions})
    payload: dict[str, Any] = {"target_encoder": {f"module.backbone.{k}": t for k, t in state.items()}}
    if masks is not None:
        predictor = {f"module.backbone.mask_tokens.{i}": torch.zeros(1, 1, 8) for i in range(masks)}
        payload["predictor"] = predictor | {"module.backbone.predictor_embed.weight": torch.zeros(8, DIM)}
    torch.save(payload, folder / "x.pt")
    return str(folder / "x.pt")


@pytest.mark.parametrize(
    ("times", "side", "masks", "family"),
    [
        (8, 14, 2, "vjepa"),
        (8, 14, None, "vjepa"),
        (8, 24, None, "vjepa"),
        (2, 6, None, "vjepa"),
        (8, 16, 2, "vjepa"),
        (8, 16, 10, "vjepa2"),
        (32, 16, 10, "vjepa2"),
        (8, 16, None, "vjepa2"),
    ],
)
def test_a_table_is_added_unless_v_jepa_2_was_published_with_it(
    times: int, side: int, masks: int | None, family: str, tmp_path: Path
) -> None:
    encoder: Any = load_encoder(f"{save(tmp_path, table(times, side), masks)}#heads={HEADS}")
    assert encoder.spec.family == family
    if family == "vjepa":
        assert (encoder.model.frames, encoder.model.side) == (times, side)
        assert torch.equal(encoder.model.pos_embed, table(times, side))
        assert encoder.spec.image_size == 4 * side
    else:
        reason = "position table that rotary models do not use"
        assert encoder.info.dropped["target_encoder.module.backbone.pos_embed"] == reason
    unsure = [note for note in encoder.info.notes if note.startswith("WARNING: the position table")]
    assert bool(unsure) == (family == "vjepa2" and masks is None)


def test_the_table_can_be_asked_for(tmp_path: Path) -> None:
    encoder = load_encoder(f"{save(tmp_path, table(8, 16), None)}#family=vjepa,heads={HEADS}")
    assert (encoder.spec.family, encoder.spec.image_size) == ("vjepa", 64)


def test_without_a_table_positions_are_rotary(tmp_path: Path) -> None:
    encoder = load_encoder(f"{save(tmp_path, None, 2)}#heads={HEADS}")
    assert encoder.spec.family == "vjepa2"
    assert not any("table" in note for note in encoder.info.notes)


def test_a_table_that_is_no_grid_of_sines_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, torch.randn(1, 2 * 6 * 6, DIM), 2)
    with pytest.raises(CheckpointError, match="no sine-cosine table of times and a square grid"):
        load_encoder(f"{path}#heads={HEADS}")
