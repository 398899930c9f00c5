"""What is exported loads in the other program and gives the same features there, or is refused."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data.config import resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import CheckpointError, ConfigError
from lmim_bench.bench.export import export_encoder
from lmim_bench.bench.exporting.to_mae import mae_line
from lmim_bench.bench.exporting.to_timm import timm_name
from lmim_bench.bench.types import Features, Pooling, Tap
from lmim_bench.bench.vit import VitArch

SIDE, PATCH, DIM, DEPTH = 32, 8, 48, 3
MODULE = "lmim_bench_test_export_factories"


def images(height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(9))


def features(reference: str, x: torch.Tensor) -> Features:
    return load_encoder(reference)(x)[Tap()]


def assert_tokens(tokens: torch.Tensor, expected: Features, prefix: int = 1) -> None:
    """Tokens after the final norm, (B, prefix + L, D), are those of lmim-bench."""
    torch.testing.assert_close(tokens[:, prefix:], expected.patches.flatten(1, 2), atol=1e-5, rtol=0)
    if expected.cls is not None:
        torch.testing.assert_close(tokens[:, 0], expected.cls, atol=1e-5, rtol=0)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def run_line(line: str) -> Any:
    """The model that the line of an export's summary makes."""
    scope: dict[str, Any] = {}
    exec(line, scope)
    return scope["model"].eval()


# ------------------------------------------------------------------------------------------- timm


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "3 heads, narrow MLP": {"num_heads": 3, "mlp_ratio": 1.5},
    "a ratio that timm rounds down": {"embed_dim": 60, "mlp_ratio": 163 / 60},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "no class token": {"class_token": False},
    "layer scale": {"init_values": 0.1},
    "no qkv bias": {"qkv_bias": False},
    "mean pooling": {"pooling": "mean"},
    "norm of the mean": {"fc_norm": True},
    "eps 1e-5": {"eps": 1e-5},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_timm_gives_the_same_features(
    variant: dict[str, Any], tmp_path: Path, save_vit: Callable[..., str]
) -> None:
    source = save_vit(tmp_path / "x.pth", mean=(0.1, 0.2, 0.3), crop_pct=0.9, **variant)
    summary = export_encoder(source, "timm", tmp_path / "out")
    assert summary.paths == (tmp_path / "out/model.safetensors", tmp_path / "out/config.json")
    assert summary.tensors == len(load_file(summary.paths[0]))
    model = run_line(summary.how_to_load)
    x = images()
    expected = features(source, x)
    with torch.inference_mode():
        assert_tokens(model.forward_features(x), expected, model.num_prefix_tokens)
        pooled = expected.cls if load_encoder(source).spec.pooling == "cls" else expected.mean
        torch.testing.assert_close(model(x), pooled, atol=1e-5, rtol=0)
    data = resolve_data_config({}, model=model)  # type: ignore[no-untyped-call]
    assert tuple(data["mean"]) == (0.1, 0.2, 0.3)
    assert (tuple(data["input_size"]), data["crop_pct"]) == ((3, SIDE, SIDE), 0.9)


@pytest.mark.parametrize("out", ["out/vit.pth", "out/vit.safetensors", "out"])
def test_timm_by_name_and_file_at_any_size(out: str, tmp_path: Path, save_vit: Callable[..., str]) -> None:
    source = save_vit(tmp_path / "x.pth")
    summary = export_encoder(source, "timm", tmp_path / out)
    config = json.loads(summary.paths[1].read_text())
    model: Any = timm.create_model(
        config["architecture"],
        checkpoint_path=str(summary.paths[0]),
        num_classes=0,
        dynamic_img_size=True,
        **config["model_args"],
    ).eval()
    for x in (images(), images(16, 48), images(64, 40)):
        with torch.inference_mode():
            assert_tokens(model.forward_features(x), features(source, x))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_timm_export_loads_here_again(
    variant: dict[str, Any], tmp_path: Path, save_vit: Callable[..., str]
) -> None:
    source = save_vit(
        tmp_path / "x.pth", mean=(0.1, 0.2, 0.3), crop_pct=0.9, interpolation="bilinear", **variant
    )
    out = export_encoder(source, "timm", tmp_path / "out").paths[0]
    old, new = load_encoder(source), load_encoder(str(out))
    own = {"family", "arch"}
    assert new.spec.model_dump(exclude=own) == old.spec.model_dump(exclude=own)
    x = images(24, 40)
    taps = [Tap(), Tap(-2, False)]
    found, expected = new(x, taps), old(x, taps)
    for tap in taps:
        torch.testing.assert_close(found[tap].patches, expected[tap].patches)
        torch.testing.assert_close(found[tap].mean, expected[tap].mean)


NAMES: dict[str, tuple[tuple[int, ...], dict[str, Any], Pooling, str, dict[str, Any]]] = {
    "tiny": ((192, 12, 3, 16, 224), {}, "cls", "vit_tiny_patch16_224", {}),
    "small/8": ((384, 12, 6, 8, 224), {}, "cls", "vit_small_patch8_224", {}),
    "base": ((768, 12, 12, 16, 224), {}, "cls", "vit_base_patch16_224", {}),
    "base at 384": ((768, 12, 12, 16, 384), {}, "cls", "vit_base_patch16_384", {}),
    "base at 160": ((768, 12, 12, 16, 160), {}, "cls", "vit_base_patch16_224", {"img_size": 160}),
    "huge": ((1280, 32, 16, 14, 224), {}, "cls", "vit_huge_patch14_224", {}),
    "six heads of another width": (
        (768, 12, 6, 16, 224),
        {},
        "cls",
        "vit_base_patch16_224",
        {"num_heads": 6},
    ),
    "registers of DINOv2": (
        (768, 12, 12, 14, 518),
        {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
        "cls",
        "vit_base_patch14_reg4_dinov2",
        {},
    ),
    "mean pooling": (
        (384, 12, 6, 16, 224),
        {},
        "mean",
        "vit_small_patch16_224",
        {"global_pool": "avg", "fc_norm": False},
    ),
    "fine-tuned": (
        (384, 12, 6, 16, 224),
        {"fc_norm": True},
        "mean",
        "vit_small_patch16_224",
        {"global_pool": "avg", "fc_norm": True},
    ),
}


@pytest.mark.parametrize("case", NAMES.values(), ids=NAMES)
def test_the_nearest_registered_model_is_named(case: tuple[Any, ...]) -> None:
    shape, more, pooling, name, args = case
    fields = dict(zip(("embed_dim", "depth", "num_heads", "patch_size", "image_size"), shape, strict=True))
    assert timm_name(VitArch(**fields, **more), pooling) == (name, args)


def test_no_registered_model_has_every_eps(tmp_path: Path, save_vit: Callable[..., str]) -> None:
    source = save_vit(tmp_path / "x.pth", eps=1e-4)
    with pytest.raises(CheckpointError, match=r"x\.pth cannot be exported as timm: no registered .* 0.0001"):
        export_encoder(source, "timm", tmp_path / "out")


def test_a_named_timm_model_keeps_its_name(tmp_path: Path) -> None:
    summary = export_encoder("timm:test_vit#pooling=mean", "timm", tmp_path / "out")
    config = json.loads(summary.paths[1].read_text())
    assert config["architecture"] == "test_vit"
    assert config["model_args"] == {"global_pool": "avg", "fc_norm": False}
    assert "random weights: not a trained model" in summary.notes
    x = images(160, 160)
    with torch.inference_mode():
        pooled = run_line(summary.how_to_load)(x)
    torch.testing.assert_close(pooled, features("timm:test_vit", x).mean, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------- MAE


def official_forward(state: dict[str, torch.Tensor], x: torch.Tensor, heads: int) -> torch.Tensor:
    """The tokens after the last block, from the description in the paper alone: (B, 1 + L, D)."""
    tokens = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    tokens = tokens.flatten(2).transpose(1, 2)
    tokens = torch.cat([state["cls_token"].expand(len(x), -1, -1), tokens], dim=1) + state["pos_embed"]
    for i in range(DEPTH):
        block = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}

        def norm(t: torch.Tensor, name: str, block: dict[str, torch.Tensor] = block) -> torch.Tensor:
            return F.layer_norm(t, (DIM,), block[f"{name}.weight"], block[f"{name}.bias"], 1e-6)

        def linear(t: torch.Tensor, name: str, block: dict[str, torch.Tensor] = block) -> torch.Tensor:
            return F.linear(t, block[f"{name}.weight"], block[f"{name}.bias"])

        qkv = linear(norm(tokens, "norm1"), "attn.qkv").reshape(len(x), -1, 3, heads, DIM // heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(-1, -2) / (DIM // heads) ** 0.5).softmax(dim=-1)
        tokens = tokens + linear((scores @ value).transpose(1, 2).flatten(2), "attn.proj")
        tokens = tokens + linear(F.gelu(linear(norm(tokens, "norm2"), "mlp.fc1")), "mlp.fc2")
    return tokens


MAE_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "3 heads": {"num_heads": 3, "mlp_ratio": 2.0},
    "no row for the class token": {"no_embed_class": True},
    "fine-tuned": {"fc_norm": True},
}


@pytest.mark.parametrize("variant", MAE_VARIANTS.values(), ids=MAE_VARIANTS)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_mae_has_the_official_layout_and_features(
    variant: dict[str, Any], suffix: str, tmp_path: Path, save_vit: Callable[..., str]
) -> None:
    source = save_vit(tmp_path / "x.pth", **variant)
    heads = variant.get("num_heads", 4)
    summary = export_encoder(source, "mae", tmp_path / f"out/mae.{suffix}")
    (path,) = summary.paths
    state = load_file(path) if suffix == "safetensors" else torch.load(path, weights_only=True)["model"]
    last = "fc_norm" if "fc_norm" in variant else "norm"
    blocks = {name for name in state if name.startswith("blocks.")}
    assert len(blocks) == 12 * DEPTH
    assert state.keys() - blocks == {
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
        f"{last}.weight", f"{last}.bias",
    }  # fmt: skip
    assert state["pos_embed"].shape == (1, 1 + (SIDE // PATCH) ** 2, DIM)
    x = images()
    expected = features(source, x)
    tokens = official_forward(state, x, heads)
    weights = (DIM,), state[f"{last}.weight"], state[f"{last}.bias"], 1e-6
    if last == "fc_norm":
        mean = F.layer_norm(tokens[:, 1:].mean(dim=1), *weights)
        torch.testing.assert_close(mean, expected.mean, atol=1e-5, rtol=0)
    else:
        tokens = F.layer_norm(tokens, *weights)
    assert_tokens(tokens, expected)
    assert f"#heads={heads}" in summary.notes[0]
    again = features(f"{path}#heads={heads}", x)
    torch.testing.assert_close(again.mean, expected.mean)
    torch.testing.assert_close(again.cls, expected.cls)


def test_the_line_that_loads_a_mae_export(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"embed_dim": 768, "depth": 12, "num_heads": 12}
    arch = VitArch(**shape, patch_size=16, image_size=224)
    line = mae_line(arch, Path("x.pth"))
    assert "model = models_vit.vit_base_patch16(num_classes=0, global_pool=False); " in line
    assert line.endswith("load_state_dict(torch.load('x.pth', map_location='cpu')['model'])")
    arch = VitArch(**shape, patch_size=8, image_size=64, fc_norm=True)
    line = mae_line(arch, Path("x.safetensors"))
    assert "models_vit.VisionTransformer(patch_size=8, embed_dim=768, depth=12, num_heads=12" in line
    assert "img_size=64, num_classes=0, global_pool=True); " in line
    assert line.endswith("load_state_dict(safetensors.torch.load_file('x.safetensors'))")
    compile(line, "line", "exec")


# ------------------------------------------------------------------------------------------- transformers


HF_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "3 heads, eps 1e-5": {"num_heads": 3, "mlp_ratio": 2.0, "eps": 1e-5},
    "no qkv bias, no row for the class token": {"qkv_bias": False, "no_embed_class": True},
}


@pytest.mark.parametrize("variant", HF_VARIANTS.values(), ids=HF_VARIANTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers_gives_the_same_features(
    variant: dict[str, Any], tmp_path: Path, save_vit: Callable[..., str]
) -> None:
    transformers = pytest.importorskip("transformers")
    source = save_vit(tmp_path / "x.pth", **variant)
    summary = export_encoder(source, "hf", tmp_path / "vit.v2")
    folder = tmp_path / "vit.v2"
    assert summary.paths[0] == folder / "model.safetensors"
    model, report = transformers.ViTModel.from_pretrained(
        folder, add_pooling_layer=False, output_loading_info=True
    )
    assert not any(report.values())
    x = images()
    with torch.inference_mode():
        tokens = run_line(summary.how_to_load)(x).last_hidden_state
    torch.testing.assert_close(tokens, model.eval()(x).last_hidden_state)
    assert_tokens(tokens, features(source, x))
    assert transformers.AutoConfig.from_pretrained(folder).layer_norm_eps == variant.get("eps", 1e-6)


@pytest.mark.parametrize("variant", HF_VARIANTS.values(), ids=HF_VARIANTS)
@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_a_folder_for_transformers_loads_here_again(
    whole: bool, variant: dict[str, Any], tmp_path: Path, save_vit: Callable[..., str]
) -> None:
    source = save_vit(
        tmp_path / "x.pth", mean=(0.1, 0.2, 0.3), crop_pct=0.8, interpolation="bilinear", **variant
    )
    weights = export_encoder(source, "hf", tmp_path / "out").paths[0]
    # The rule for positions of other sizes is that of transformers, unless another is asked for.
    reference = f"{weights.parent if whole else weights}#pos_interpolation=timm"
    old, new = load_encoder(source), load_encoder(reference)
    own = {"family", "arch"}
    assert new.spec.model_dump(exclude=own) == old.spec.model_dump(exclude=own)
    assert new.spec.arch["num_heads"] == old.spec.arch["num_heads"]
    taps = [Tap(), Tap(-2, False)]
    for x in (images(), images(24, 40)):
        found, expected = new(x, taps), old(x, taps)
        for tap in taps:
            torch.testing.assert_close(found[tap].patches, expected[tap].patches)
            torch.testing.assert_close(found[tap].cls, expected[tap].cls)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers_prepares_the_same_images(tmp_path: Path, save_vit: Callable[..., str]) -> None:
    transformers = pytest.importorskip("transformers")
    source = save_vit(tmp_path / "x.pth", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), crop_pct=0.8)
    export_encoder(source, "hf", tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    image = Image.new("RGB", (60, 40), (51, 102, 255))
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, SIDE, SIDE)
    expected = torch.tensor([(0.2 - 0.1) / 0.5, (0.4 - 0.2) / 0.6, (1 - 0.3) / 0.7])
    torch.testing.assert_close(pixels[0, :, 5, 5], expected)


def test_transformers_files_are_written_without_transformers(
    tmp_path: Path, save_vit: Callable[..., str]
) -> None:
    source = save_vit(tmp_path / "x.pth", crop_pct=0.8, interpolation="bilinear")
    summary = export_encoder(source, "hf", tmp_path / "out/model.safetensors")
    assert [path.name for path in summary.paths] == [
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
    ]
    state = load_file(summary.paths[0])
    fused = load_encoder(source).model.state_dict()["blocks.1.attn.qkv.weight"]  # type: ignore[attr-defined]
    parts = [
        state[f"encoder.layer.1.attention.attention.{name}.weight"] for name in ("query", "key", "value")
    ]
    assert torch.equal(torch.cat(parts), fused)
    assert summary.tensors == 6 + 16 * DEPTH
    prepare = json.loads(summary.paths[2].read_text())
    assert prepare["size"] == {"shortest_edge": 40}
    assert prepare["resample"] == Image.Resampling.BILINEAR


# ------------------------------------------------------------------------------------------- refusals, notes


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "mae, registers": ({"reg_tokens": 2}, "mae", "no register tokens"),
    "mae, no class token": ({"class_token": False}, "mae", "no encoder without a class token"),
    "mae, layer scale": ({"init_values": 0.1}, "mae", "no layer scale"),
    "mae, no bias": ({"qkv_bias": False}, "mae", "no attention without a bias"),
    "mae, eps": ({"eps": 1e-5}, "mae", r"no norms of eps 1e-05 \(its models have 1e-06\)"),
    "mae, two reasons": (
        {"reg_tokens": 2, "init_values": 0.1},
        "mae",
        "MAE knows no register tokens, no layer scale; use the format timm",
    ),
    "hf, registers": ({"reg_tokens": 2}, "hf", "no register tokens"),
    "hf, no class token": ({"class_token": False}, "hf", "no encoder without a class token"),
    "hf, layer scale": ({"init_values": 0.1}, "hf", "no layer scale"),
    "hf, norm of the mean": ({"fc_norm": True}, "hf", "no norm after the mean"),
}


@pytest.mark.parametrize(("variant", "form", "words"), REFUSED.values(), ids=REFUSED)
def test_what_a_layout_cannot_say_is_refused(
    variant: dict[str, Any], form: Any, words: str, tmp_path: Path, save_vit: Callable[..., str]
) -> None:
    source = save_vit(tmp_path / "x.pth", **variant)
    with pytest.raises(CheckpointError, match=rf"x\.pth cannot be exported as {form}: .*{words}"):
        export_encoder(source, form, tmp_path / ("out.pth" if form == "mae" else "out"))
    assert names(tmp_path) == ["x.pth"]


@pytest.mark.parametrize("form", ["hf", "mae"])
def test_an_attention_pooling_is_not_left_out(
    form: Any, tmp_path: Path, save_vit: Callable[..., str]
) -> None:
    source = save_vit(tmp_path / "x.pth", class_token=False, map_pool=True)
    with pytest.raises(CheckpointError, match=r"x\.pth cannot be exported as .*attn_pool"):
        export_encoder(source, form, tmp_path / "out.pth" if form == "mae" else tmp_path / "out")


@pytest.mark.parametrize("reference", ["pixels", "timm:test_resnet"])
def test_only_plain_transformers_are_exported(reference: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{reference} is no plain vision transformer"):
        export_encoder(reference, "timm", tmp_path / "out")


FACTORIES = """
from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock, VisionTransformer

SHAPE = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=5)

def plain():
    return VisionTransformer(**SHAPE, drop_path_rate=0.1, proj_drop_rate=0.1)

def quick():
    return VisionTransformer(**SHAPE, act_layer="quick_gelu")

def qk_norm():
    return VisionTransformer(**SHAPE, qk_norm=True)

def pre_norm():
    return VisionTransformer(**SHAPE, pre_norm=True)

def no_norm():
    return VisionTransformer(**SHAPE, final_norm=False)

def parallel():
    return VisionTransformer(**SHAPE, block_fn=ParallelThingsBlock)

def post():
    return VisionTransformer(**SHAPE, block_fn=ResPostBlock)
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / f"{MODULE}.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return f"python:{MODULE}"


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("quick", r"its blocks\.0\.mlp\.act is QuickGELU"),
        ("qk_norm", r"its blocks\.0\.attn\.q_norm is LayerNorm"),
        ("pre_norm", "its norm_pre is LayerNorm"),
        ("no_norm", "its norm is absent"),
        ("parallel", r"block 0 .*\(ParallelThingsBlock, NoneType, NoneType\)"),
        ("post", r"block 0 is not that of a plain vision transformer \(ResPostBlock"),
    ],
)
@pytest.mark.parametrize("form", ["timm", "hf", "mae"])
def test_arithmetic_that_no_shape_shows_is_refused(
    factories: str, factory: str, words: str, form: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        export_encoder(f"{factories}:{factory}", form, tmp_path / ("out.pth" if form == "mae" else "out"))


def test_a_factory_is_exported_without_its_head(factories: str, tmp_path: Path) -> None:
    reference = f"{factories}:plain"
    summary = export_encoder(reference, "timm", tmp_path / "out")
    x = images()
    with torch.inference_mode():
        assert_tokens(run_line(summary.how_to_load).forward_features(x), features(reference, x))


def test_positions_follow_the_image_size_that_is_asked_for(
    tmp_path: Path, save_vit: Callable[..., str]
) -> None:
    source = save_vit(tmp_path / "x.pth")
    reference = f"{source}#image_size=48"
    x = images(48, 48)
    summary = export_encoder(reference, "timm", tmp_path / "out")
    assert "positions resampled from 4x4 to 6x6 patches by timm's rule" in summary.notes
    with torch.inference_mode():
        assert_tokens(run_line(summary.how_to_load).forward_features(x), features(reference, x))
    (path,) = export_encoder(reference, "mae", tmp_path / "mae.pth").paths
    model = VisionTransformer(
        img_size=48, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=4, num_classes=0
    )
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    with torch.inference_mode():
        assert_tokens(model.eval().forward_features(x), features(reference, x))


def test_what_a_layout_cannot_say_of_the_global_feature_is_noted(
    tmp_path: Path, save_vit: Callable[..., str]
) -> None:
    source = save_vit(tmp_path / "x.pth", pooling="cls+mean", final_norm=False)
    notes = " ".join(export_encoder(source, "timm", tmp_path / "out").notes)
    assert "is taken before the final norm" in notes
    assert "timm pools the class token alone" in notes
    source = save_vit(tmp_path / "y.pth", pooling="mean")
    notes = " ".join(export_encoder(source, "hf", tmp_path / "hf").notes)
    assert "the global feature here (mean): last_hidden_state[:, 1:].mean(1)" in notes
    notes = " ".join(export_encoder(source, "mae", tmp_path / "mae.safetensors").notes)
    assert "the global feature here is mean; models_vit.py returns the class token" in notes
    assert "main_finetune.py reads torch files only" in notes
    assert "normalisation" not in notes
    source = save_vit(tmp_path / "z.pth", mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
    notes = " ".join(export_encoder(source, "mae", tmp_path / "z-mae.pth").notes)
    assert "lmim-bench needs #mean=0.5:0.5:0.5,std=0.5:0.25:0.5" in notes


# ------------------------------------------------------------------------------------------- files


def test_nothing_is_overwritten_and_no_folder_is_shared(tmp_path: Path, save_vit: Callable[..., str]) -> None:
    source = save_vit(tmp_path / "x.pth")
    with pytest.raises(ConfigError, match=r"x\.pth exists; delete it or choose another --out"):
        export_encoder(source, "mae", source)
    with pytest.raises(ConfigError, match=r"holds other weights \(x\.pth\).* choose a folder of its own"):
        export_encoder(source, "timm", tmp_path / "y.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.json exists; delete it"):
        export_encoder(source, "hf", tmp_path / "out")
    export_encoder(source, "mae", tmp_path / "y.pth")


@pytest.mark.parametrize(
    ("form", "out", "words"),
    [
        ("mae", "out", "the format mae is one file"),
        ("mae", "x.bin", r"ends in \.pth or \.pt or \.safetensors, not \.bin"),
        ("timm", "x.ckpt", r"ends in \.safetensors or \.pth, not \.ckpt"),
        ("hf", "x.safetensors", r"a folder with model\.safetensors; give the folder"),
        ("onnx", "x.onnx", "there is no format 'onnx'"),
    ],
)
def test_an_out_that_does_not_suit_the_format(
    form: Any, out: str, words: str, tmp_path: Path, save_vit: Callable[..., str]
) -> None:
    source = save_vit(tmp_path / "source.pth")
    with pytest.raises(ConfigError, match=words):
        export_encoder(source, form, tmp_path / "folder" / out)
    assert names(tmp_path) == ["source.pth"]


def test_a_failed_export_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_vit: Callable[..., str]
) -> None:
    source = save_vit(tmp_path / "x.pth")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("json.dump", full)
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be written: No space left on device"):
        export_encoder(source, "timm", tmp_path / "out")
    assert names(tmp_path / "out") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: "):
        export_encoder(source, "mae", tmp_path / "file/x.pth")
