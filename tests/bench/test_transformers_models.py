"""Image models of transformers that no family reads, against what transformers itself makes of the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmim_bench.bench import transformers_models
from lmim_bench.bench.api import run
from lmim_bench.bench.encoders import inspect_checkpoint, load_encoder
from lmim_bench.bench.errors import CheckpointError, TaskError
from lmim_bench.bench.types import Tap

hf = pytest.importorskip("transformers")

COLUMN: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}
WINDOWS: dict[str, Any] = {
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 4,
    "image_size": 32,
}
HIERA: dict[str, Any] = {"embed_dim": 8, "image_size": [64, 64], "depths": [1, 1, 1], "num_heads": [1, 2, 4]}
HIERA |= {"num_query_pool": 2, "query_stride": [2, 2], "masked_unit_size": [4, 4]}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "aimv2": ("Aimv2VisionConfig", "Aimv2VisionModel", COLUMN),
    "convnext": ("ConvNextConfig", "ConvNextModel", STAGES),
    "convnextv2": ("ConvNextV2Config", "ConvNextV2Model", STAGES),
    "dinov3-convnext": ("DINOv3ConvNextConfig", "DINOv3ConvNextModel", STAGES),
    "hiera": ("HieraConfig", "HieraModel", HIERA),
    "internvl": ("InternVLVisionConfig", "InternVLVisionModel", COLUMN),
    "mlcd": ("MLCDVisionConfig", "MLCDVisionModel", COLUMN),
    "pixio": ("PixioConfig", "PixioModel", COLUMN),
    "resnet": ("ResNetConfig", "ResNetModel", {"embedding_size": 8, **STAGES}),
    "swin": ("SwinConfig", "SwinModel", WINDOWS),
    "tipsv2": ("Tipsv2VisionConfig", "Tipsv2VisionModel", COLUMN),
}
# Its table has one size, and the library does not resample it.
ONE_SIZE = ("aimv2",)


def model_of(name: str, cls: str | None = None, **changes: Any) -> Any:
    """A small model with weights that are neither constant nor tiny."""
    config, model, numbers = MODELS[name]
    torch.manual_seed(0)
    built = getattr(hf, cls or model)(getattr(hf, config)(**{**numbers, **changes})).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return built


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> str:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders as save_pretrained writes them, in a place of their own."""

    def save(name: str, cls: str | None = None, **changes: Any) -> Path:
        place = tmp_path_factory.mktemp(name)
        model_of(name, cls, **changes).save_pretrained(place)
        return place

    return save


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_the_features_are_those_of_the_library(name: str, folder: Callable[..., Path]) -> None:
    place = folder(name)
    encoder: Any = load_encoder(str(place))
    assert (encoder.spec.family, encoder.info.random_weights) == ("transformers", False)
    expected_of = hf.AutoModel.from_pretrained(place).eval()
    side, patch = encoder.spec.arch["probed_at"], encoder.spec.patch_size
    for size in [(side, side)] + ([(side + patch, side + 3 * patch)] if name not in ONE_SIZE else []):
        option = {"interpolate_pos_encoding": True} if name in ("hiera", "swin") else {}
        with torch.inference_mode():
            expected = expected_of(pixel_values=images(*size), **option)
        found = encoder(images(*size))[Tap()]
        grid = (size[0] // patch, size[1] // patch)
        assert found.patches.shape == (2, *grid, encoder.spec.embed_dim)
        last = expected.last_hidden_state
        body = last.flatten(2).mT if last.ndim == 4 else last[:, -grid[0] * grid[1] :]
        torch.testing.assert_close(found.patches.flatten(1, 2), body, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.mean, body.mean(dim=1), atol=1e-5, rtol=1e-5)
        if found.cls is None:
            torch.testing.assert_close(found.mean, expected.pooler_output.flatten(1), atol=1e-4, rtol=1e-4)
        else:
            pooled = getattr(expected, "pooler_output", None)
            torch.testing.assert_close(found.cls, last[:, 0] if pooled is None else pooled)


@pytest.mark.parametrize("name", ["pixio", "tipsv2"])
def test_every_block_can_be_read(name: str, folder: Callable[..., Path]) -> None:
    place = folder(name)
    encoder: Any = load_encoder(str(place))
    model = hf.AutoModel.from_pretrained(place).eval()
    states: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == COLUMN["num_hidden_layers"]:
            for block in module:
                block.register_forward_hook(
                    lambda _m, _i, out: states.append(out[0] if isinstance(out, tuple) else out)
                )
    with torch.inference_mode():
        last = model(pixel_values=images(32, 32)).last_hidden_state
        normed = [model.layernorm(state) for state in states]
    assert encoder.spec.depth == len(states) == 3
    taps = [Tap(layer, norm) for layer in (-3, -2, -1) for norm in (False, True)]
    found = encoder(images(32, 32), taps)
    for tap in taps:
        expected = (normed if tap.norm else states)[tap.layer][:, -16:]
        torch.testing.assert_close(found[tap].patches.flatten(1, 2), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[Tap()].patches.flatten(1, 2), last[:, -16:])
    assert torch.equal(found[Tap(-2, False)].cls, states[-2][:, 0])


def test_prefix_tokens_are_told_from_patches(folder: Callable[..., Path]) -> None:
    """Pixio has eight class tokens, and its own global feature is their mean."""
    said = inspect_checkpoint(str(folder("pixio")))
    assert said["tokens"] == {"class": True, "registers": 7, "patches": 16}
    assert any(note.startswith("built by transformers") for note in said["notes"])


def test_heads_of_the_pretext_task_are_dropped(folder: Callable[..., Path]) -> None:
    bare, whole = folder("swin"), folder("swin", "SwinForMaskedImageModeling", encoder_stride=8)
    state = load_file(bare / "model.safetensors")
    # The weights of the one in the place of the other's encoder.
    change(whole, lambda s: s.update({f"swin.{key}": tensor for key, tensor in state.items()}))
    encoder, expected = load_encoder(str(whole)), load_encoder(str(bare))
    assert encoder.info.dropped == {
        "decoder.*": "head of the pre-training",
        "swin.embeddings.mask_token": "token of the pretext task",
    }
    assert torch.equal(encoder(images(32, 32))[Tap()].patches, expected(images(32, 32))[Tap()].patches)


def test_the_image_tower_of_a_model_for_texts_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.Aimv2Config(vision_config=COLUMN, text_config={**text, "vocab_size": 30}, projection_dim=16)
    model = hf.Aimv2Model(config).eval()
    model.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert "text_model.*" in encoder.info.dropped
    with torch.inference_mode():
        expected = model.vision_model(pixel_values=images(32, 32)).last_hidden_state
    found = encoder(images(32, 32))[Tap()].patches
    torch.testing.assert_close(found.flatten(1, 2), expected, atol=1e-5, rtol=1e-5)


def test_random_weights_of_the_same_architecture(folder: Callable[..., Path]) -> None:
    place = folder("pixio")
    control = load_encoder(f"random:{place}", seed=3)
    assert control.info.random_weights
    assert control.spec == load_encoder(str(place)).spec
    assert control.fingerprint == load_encoder(f"random:{place}", seed=3).fingerprint
    assert control.fingerprint != load_encoder(f"random:{place}", seed=4).fingerprint


# ------------------------------------------------------------------------------------------- refusals


def test_what_does_not_fill_the_model_is_refused(folder: Callable[..., Path]) -> None:
    place = folder("pixio")
    change(place, lambda state: state.pop("encoder.layer.1.norm1.weight"))
    with pytest.raises(CheckpointError, match=r"does not fill .* PixioModel: it lacks .*layers\.1"):
        load_encoder(str(place))


def test_what_the_model_does_not_know_is_refused(folder: Callable[..., Path]) -> None:
    place = folder("pixio")
    change(place, lambda state: state.update({"encoder.layer.1.adapter.weight": torch.randn(2, 2)}))
    with pytest.raises(CheckpointError, match=r"does not fill .* PixioModel: it has too .*adapter\.weight$"):
        load_encoder(str(place))
    place = folder("pixio")
    expected = load_encoder(str(place)).fingerprint
    change(place, lambda state: state.update({"gate.weight": torch.randn(2, 2)}))
    with pytest.raises(CheckpointError, match=r"it has too gate\.weight; .* add #ignore=gate$"):
        load_encoder(str(place))
    assert load_encoder(f"{place}#ignore=gate").fingerprint == expected


def test_another_width_is_refused(folder: Callable[..., Path]) -> None:
    place = folder("pixio")
    stated = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**stated, "hidden_size": 48}))
    with pytest.raises(CheckpointError, match="transformers' PixioModel does not take the weights"):
        load_encoder(str(place))


def test_weights_that_diverged_are_refused(folder: Callable[..., Path]) -> None:
    place = folder("pixio")
    change(place, lambda state: state["layernorm.weight"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"layernorm\.weight holds 32 NaN or infinite values"):
        load_encoder(str(place))


def test_a_model_of_videos_is_refused(tmp_path: Path) -> None:
    hf.VideoMAEModel(hf.VideoMAEConfig(**COLUMN)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="VideoMAEModel does not take images of 32 pixels"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("kind", ["yolos", "detr", "bert", "timm_wrapper", "no-such-model"])
def test_detectors_texts_and_wrappers_are_left_to_others(kind: str) -> None:
    assert transformers_models.image_model({"model_type": kind}) is None


def test_features_in_another_order_are_refused(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a model that puts its other tokens last."""
    forward = hf.PixioModel.forward

    def turned(self: Any, pixel_values: torch.Tensor) -> Any:
        out = forward(self, pixel_values=pixel_values)
        out.last_hidden_state = out.last_hidden_state.roll(-8, dims=1)
        return out

    monkeypatch.setattr(hf.PixioModel, "forward", turned)
    with pytest.raises(CheckpointError, match="PixioModel are not in the order of its patches"):
        load_encoder(str(folder("pixio")))


def test_features_that_change_by_chance_are_refused(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a model that masks patches in evaluation too."""
    forward = hf.PixioModel.forward

    def masking(self: Any, pixel_values: torch.Tensor) -> Any:
        return forward(self, pixel_values=pixel_values * (torch.rand_like(pixel_values) > 0.5))

    monkeypatch.setattr(hf.PixioModel, "forward", masking)
    with pytest.raises(CheckpointError, match="PixioModel gives other features of the same image each time"):
        load_encoder(str(folder("pixio")))


def test_positions_follow_the_library_alone(folder: Callable[..., Path]) -> None:
    encoder = load_encoder(str(folder("pixio")))
    encoder(images(32, 32), pos_interpolation="dino")
    with pytest.raises(
        TaskError, match=r"by its own rule, for which 'bicubic' stands; 'dino' is not available"
    ):
        encoder(images(40, 32), pos_interpolation="dino")
    # A network without a table has nothing to resample.
    load_encoder(str(folder("resnet")))(images(256, 256), pos_interpolation="dino")


def test_without_the_library_the_way_out_is_said(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = folder("pixio")
    monkeypatch.setattr(transformers_models, "version", lambda name: "4.57.1")
    with pytest.raises(CheckpointError, match=r"pip install 'lmim-bench\[transformers\]' reads it"):
        load_encoder(str(place))


def test_code_and_choices_beside_the_weights_are_passed_over(folder: Callable[..., Path]) -> None:
    """What a configuration asks to fetch or to run is no part of the network."""
    place = folder("pixio")
    stated = json.loads((place / "config.json").read_text())
    (place / "evil.py").write_text("raise SystemExit('ran')")
    stated |= {
        "auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"},
        "_attn_implementation": "somebody/kernel",
        "attn_implementation": "somebody/kernel",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "torch_dtype": "float16",
    }
    expected = load_encoder(str(place))
    (place / "config.json").write_text(json.dumps(stated))
    assert load_encoder(str(place)).fingerprint == expected.fingerprint


def test_a_run_scores_it(folder: Callable[..., Path], tmp_path: Path) -> None:
    finished = run(
        {"pixio": str(folder("pixio"))},
        tasks=["knn", "vos"],
        out=tmp_path / "run",
        limit=40,
        overrides={"vos": {"size": 48}},
    )
    knn, vos = finished.results
    assert (knn.status, vos.status) == ("ok", "ok")
    said = "positions of other sizes are resampled as transformers does it, not by the rule 'dino'"
    assert any(note.startswith(said) for note in vos.notes)
    assert not any(said in note for note in knn.notes)


def test_the_encoder_is_no_view_of_its_file_and_draws_nothing(folder: Callable[..., Path]) -> None:
    place = folder("pixio")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    encoder = load_encoder(str(place))
    assert torch.equal(torch.rand(3), expected)
    before = encoder(images(32, 32))[Tap()].patches
    file = place / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(-4096, 2)
        stream.write(bytes(4096))
    assert torch.equal(encoder(images(32, 32))[Tap()].patches, before)
