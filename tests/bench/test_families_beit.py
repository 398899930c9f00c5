"""BEiT and its descendants beyond the recordings: choices, refusals, what a file says, other grids."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch

from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import CheckpointError, TaskError
from lmim_bench.bench.networks.beit import growing_positions, relative_bias, resampling_matrix, rotations
from lmim_bench.bench.types import Tap

State = dict[str, torch.Tensor]
HALF = (0.5, 0.5, 0.5)
IMAGENET = (0.485, 0.456, 0.406)


@pytest.fixture
def written(layouts: ModuleType, tmp_path: Path) -> Any:
    """Writes a recorded layout; returns its path and what the file holds, to be changed and saved again."""

    def write(name: str) -> tuple[Path, dict[str, Any]]:
        reference, _ = layouts.write(name, tmp_path)
        path = Path(reference.partition("#")[0])
        return path, torch.load(path, weights_only=False)

    return write


def refusal(reference: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_encoder(str(reference))
    return str(caught.value)


# ------------------------------------------------------------------------------------- what the file says


def test_heads_that_contradict_the_table_of_positions_are_refused(written: Any) -> None:
    path, _ = written("beit")
    text = refusal(f"{path}#heads=8")
    assert "the table of relative positions is for 4 heads; leave out heads=8" in text
    encoder: Any = load_encoder(f"{path}#heads=4")
    assert encoder.spec.arch["num_heads"] == 4


def test_without_any_table_of_heads_the_number_must_be_given(written: Any) -> None:
    path, _ = written("beit-absolute")
    assert "add #heads=N" in refusal(path)


@pytest.mark.parametrize(
    ("args", "mean", "note"),
    [
        (argparse.Namespace(imagenet_default_mean_and_std=True), IMAGENET, "as the options in the file say"),
        (argparse.Namespace(imagenet_default_mean_and_std=False), HALF, "as the options in the file say"),
        (argparse.Namespace(), HALF, "WARNING: mean and std are assumed"),
        (None, HALF, "WARNING: mean and std are assumed"),
    ],
)
def test_mean_and_deviation_follow_the_options_of_the_run(
    written: Any, args: Any, mean: tuple[float, ...], note: str
) -> None:
    path, payload = written("beit")
    torch.save({**payload, "args": args}, path)
    encoder: Any = load_encoder(str(path))
    assert encoder.spec.mean == mean
    assert any(note in said for said in encoder.info.notes)


def test_mean_and_deviation_of_timms_config_beside_the_file_are_taken(written: Any) -> None:
    path, payload = written("beit-finetuned")
    torch.save({"module": payload["module"]}, path)
    config = {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (path.parent / "config.json").write_text(json.dumps(config))
    encoder: Any = load_encoder(str(path))
    assert encoder.spec.mean == (0.1, 0.2, 0.3)
    assert encoder.spec.std == (0.4, 0.5, 0.6)


def test_a_file_of_timms_own_beit_gives_timms_features(tmp_path: Path) -> None:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("beit_base_patch16_224", num_classes=5, **shape).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    encoder: Any = load_encoder(str(tmp_path / "model.pth"))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(encoder(images)[Tap()].mean, expected, atol=1e-5, rtol=1e-5)


def test_the_pretext_layers_of_beit_v2_are_dropped_and_tell_its_statistics(written: Any) -> None:
    path, payload = written("beit2")
    torch.save({"model": payload["model"]}, path)
    encoder: Any = load_encoder(str(path))
    assert encoder.spec.mean == IMAGENET
    assert encoder.info.dropped["model.cls_pt_layers.*"] == "head of the pretext task"


def test_the_default_encoder_is_the_trained_one_and_the_average_can_be_picked(written: Any) -> None:
    path, _ = written("data2vec")
    images = torch.zeros(1, 3, 32, 32)
    usual: Any = load_encoder(str(path))
    average: Any = load_encoder(f"{path}#model_ema")
    assert usual.info.container == "model"
    assert average.info.container == "model_ema"
    assert usual.info.dropped["model_ema.*"] == "another encoder of the file"
    difference = usual(images)[Tap()].patches - average(images)[Tap()].patches
    assert difference.abs().max() > 0.1


def test_a_fine_tuned_simmim_file_is_told_from_beit_by_its_configuration(written: Any) -> None:
    path, payload = written("simmim-finetuned")
    del payload["config"]
    torch.save(payload, path)
    encoder: Any = load_encoder(str(path))
    assert encoder.spec.family == "beit"
    assert any("WARNING: mean and std" in note for note in encoder.info.notes)


def test_a_picked_teacher_of_data2vec_2_names_what_it_leaves_out(written: Any) -> None:
    path, _ = written("data2vec2")
    encoder: Any = load_encoder(f"{path}#_ema")
    assert encoder.info.container == "model._ema"
    assert encoder.info.dropped["model.blocks.*"] == "the online network"
    assert encoder.info.dropped["last_optimizer_state.*"] == "training state"


def test_heads_of_data2vec_2_come_from_its_configuration(written: Any) -> None:
    path, payload = written("data2vec2")
    encoder: Any = load_encoder(str(path))
    assert "4 heads, from the configuration in the file" in encoder.info.notes
    torch.save({"model": payload["model"]}, path)
    assert "add #heads=N" in refusal(path)


def test_the_grid_of_rotary_positions_is_read_from_a_file_in_half_precision(written: Any) -> None:
    path, payload = written("eva02-finetuned")
    state = {name: tensor.half() for name, tensor in payload["module"].items()}
    torch.save({"module": state}, path)
    encoder: Any = load_encoder(str(path))
    assert encoder.spec.arch["rotary"] == 4
    assert encoder.spec.image_size == 42
    assert encoder.spec.arch["num_heads"] == 4


# ------------------------------------------------------------------------------------- refusals


def test_a_missing_tensor_is_named_with_the_family(written: Any) -> None:
    path, payload = written("beit-finetuned")
    del payload["module"]["blocks.1.attn.relative_position_bias_table"]
    torch.save(payload, path)
    text = refusal(path)
    assert "does not fill the beit encoder" in text
    assert "blocks.1.attn.relative_position_bias_table" in text


@pytest.mark.parametrize(
    ("name", "container", "pattern"),
    [("simmim", "model", "encoder.blocks.1."), ("data2vec2", "model", "blocks.0.")],
)
def test_a_missing_block_is_refused(written: Any, name: str, container: str, pattern: str) -> None:
    path, payload = written(name)
    kept = {k: t for k, t in payload[container].items() if not k.startswith(pattern)}
    torch.save({**payload, container: kept}, path)
    # The teacher in the file is complete, and is not taken instead.
    assert "lacks block 1 of 3" in refusal(path)


def test_a_teacher_never_stands_in_for_an_online_network_without_positions(written: Any) -> None:
    path, payload = written("data2vec2")
    position = "modality_encoders.IMAGE.fixed_positional_encoder.positions"
    del payload["model"][position]
    torch.save(payload, path)
    assert f"'model' lacks {position}, which 'model._ema' has; to score the other, add #_ema" in refusal(path)


def test_tables_of_two_grids_are_refused(written: Any) -> None:
    path, payload = written("beit")
    payload["model"]["pos_embed"] = torch.randn(1, 26, 96)
    torch.save(payload, path)
    assert "relative positions is for 4x4 patches and pos_embed is for 5x5 patches" in refusal(path)


def test_a_table_that_is_no_square_grid_is_refused(written: Any) -> None:
    path, payload = written("beit")
    payload["model"]["rel_pos_bias.relative_position_bias_table"] = torch.randn(7 * 9 + 3, 4)
    torch.save(payload, path)
    assert "no square grid" in refusal(path)


def test_rotary_positions_of_another_kind_are_refused(written: Any) -> None:
    path, payload = written("eva02")
    for name, tensor in payload["module"].items():
        if name.endswith("rope.freqs_cos"):
            payload["module"][name] = tensor.flip(1)
    torch.save(payload, path)
    assert "not that of EVA-02" in refusal(path)


def test_attention_biased_by_distance_is_refused(written: Any) -> None:
    path, payload = written("data2vec2")
    payload["model"]["modality_encoders.IMAGE.alibi_scale"] = torch.ones(1, 1, 4, 1, 1)
    torch.save(payload, path)
    assert "alibi" in refusal(path)


def test_the_image_tower_of_an_image_text_model_is_not_read_as_beit(written: Any) -> None:
    path, payload = written("beit-finetuned")
    torch.save({f"visual.{name}": tensor for name, tensor in payload["module"].items()}, path)
    assert "no encoder in the layout of BEiT" in refusal(f"{path}#family=beit")


def test_a_decoder_of_another_kind_beside_the_encoder_is_no_simmim(written: Any) -> None:
    path, payload = written("simmim")
    state = {k: t for k, t in payload["model"].items() if not k.startswith("decoder.")}
    torch.save({"model": {**state, "quantize.weight": torch.randn(4, 4)}}, path)
    assert "does not know: model.quantize" in refusal(path)


# ------------------------------------------------------------------------------------- other grids


def slow_bias(table: torch.Tensor, side: int) -> torch.Tensor:
    """The biases of the table's own grid, pair by pair."""
    tokens = 1 + side * side
    bias = torch.empty(table.shape[1], tokens, tokens)
    for i in range(tokens):
        for j in range(tokens):
            if i == 0 or j == 0:
                row = -1 if i == j else -3 if i == 0 else -2
            else:
                (y, x), (v, u) = divmod(i - 1, side), divmod(j - 1, side)
                row = (y - v + side - 1) * (2 * side - 1) + (x - u + side - 1)
            bias[:, i, j] = table[row]
    return bias


def test_biases_of_the_own_grid_are_the_entries_of_the_table() -> None:
    table = torch.randn(5 * 5 + 3, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(relative_bias(table, 3, (3, 3)), slow_bias(table, 3))


def test_a_table_resampled_by_rows_keeps_what_depends_on_columns_only() -> None:
    along = torch.randn(7, generator=torch.Generator().manual_seed(0))
    field = along.expand(7, 7).reshape(49, 1)
    table = torch.cat([field, torch.zeros(3, 1)])
    bias = relative_bias(table, 4, (6, 4))[0, 1:, 1:].unflatten(0, (6, 4)).unflatten(2, (6, 4))
    for x in range(4):
        for u in range(4):
            torch.testing.assert_close(bias[:, x, :, u], along[x - u + 3].expand(6, 6))


def test_turning_the_table_and_the_image_turns_the_biases() -> None:
    field = torch.randn(7, 7, 2, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    wide = relative_bias(torch.cat([field.reshape(49, 2), tokens]), 4, (5, 8))
    high = relative_bias(torch.cat([field.transpose(0, 1).reshape(49, 2), tokens]), 4, (8, 5))
    order = torch.cat([torch.tensor([0]), 1 + torch.arange(40).reshape(5, 8).T.reshape(-1)])
    torch.testing.assert_close(wide[:, order][:, :, order], high)


def test_growing_positions_reach_the_new_edge_in_steps_of_one_factor() -> None:
    positions = torch.tensor(growing_positions(27, 47), dtype=torch.float64)
    steps = positions.diff()
    assert positions[13] == 0
    assert positions[-1].item() == pytest.approx(23, abs=1e-2)
    assert steps[13].item() == pytest.approx(1)
    ratios = steps[14:] / steps[13:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
    torch.testing.assert_close(positions, -positions.flip(0))


def test_resampling_keeps_straight_lines_in_the_positions() -> None:
    matrix = resampling_matrix(13, 19)
    at = torch.tensor(growing_positions(13, 19))
    read = (matrix @ at)[1:-1]
    torch.testing.assert_close(read, torch.arange(-8.0, 9.0), atol=1e-4, rtol=0)


def test_rotary_positions_span_the_same_places_at_every_size() -> None:
    like = torch.zeros(1)
    small, large = rotations((4, 4), 4, 8, like), rotations((8, 6), 4, 8, like)
    # Row 2 of 4 and row 4 of 8 are the same place.
    torch.testing.assert_close(small[0].unflatten(0, (4, 4))[2, 0], large[0].unflatten(0, (8, 6))[4, 0])
    torch.testing.assert_close(small[1].unflatten(0, (4, 4))[0, 2], large[1].unflatten(0, (8, 6))[0, 3])


@pytest.mark.parametrize("name", ["beit", "beit-finetuned", "eva02", "data2vec2"])
@pytest.mark.parametrize("grid", [(4, 7), (3, 2)])
def test_images_need_not_be_square(written: Any, name: str, grid: tuple[int, int]) -> None:
    path, _ = written(name)
    encoder: Any = load_encoder(str(path))
    size = [n * encoder.spec.patch_size for n in grid]
    features = encoder(torch.ones(2, 3, *size), (Tap(), Tap(-2, False)))
    for found in features.values():
        assert found.patches.shape == (2, *grid, 96)
        assert torch.isfinite(found.patches).all()


def test_a_table_too_small_for_a_spline_serves_its_own_grid_only(written: Any) -> None:
    path, payload = written("beit")
    payload["model"]["rel_pos_bias.relative_position_bias_table"] = torch.randn(3 * 3 + 3, 4)
    torch.save(payload, path)
    encoder: Any = load_encoder(str(path))
    assert encoder(torch.zeros(1, 3, 16, 16))[Tap()].patches.shape == (1, 2, 2, 96)
    with pytest.raises(TaskError, match="cannot be resampled"):
        encoder(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["beit", "eva02"])
def test_lower_precision_runs_and_stays_near(written: Any, name: str) -> None:
    path, _ = written(name)
    encoder: Any = load_encoder(str(path))
    side = encoder.spec.image_size
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    exact = encoder(images)[Tap()].patches
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = encoder(images)[Tap()].patches
    assert torch.nn.functional.cosine_similarity(exact, rough.float(), dim=-1).min() > 0.99


def test_random_weights_of_the_same_network_are_a_control(written: Any) -> None:
    path, _ = written("eva02")
    encoder: Any = load_encoder(f"random:{path}", seed=1)
    assert encoder.info.random_weights
    assert torch.isfinite(encoder(torch.ones(1, 3, 28, 28))[Tap()].patches).all()
