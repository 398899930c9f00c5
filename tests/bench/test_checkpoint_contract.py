"""The contract of coverage: everything filled, nothing left over, no value that cannot be."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from lmim_bench.bench.checkpoints import loading
from lmim_bench.bench.checkpoints.family import Family, Root, grow_tree
from lmim_bench.bench.checkpoints.plain_vit import ANCHORS, plain_draft
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import CheckpointError
from lmim_bench.bench.timm_models import create_timm
from lmim_bench.bench.vit import build_vit, vit_spec

State = dict[str, torch.Tensor]
QKV = "blocks.1.attn.qkv.weight"


@pytest.fixture
def state() -> State:
    spec = vit_spec("x", embed_dim=24, depth=2, num_heads=2, patch_size=8, image_size=32)
    torch.manual_seed(0)
    return {k: torch.randn_like(v) for k, v in build_vit(spec.arch).state_dict().items()}


def load(payload: dict[str, Any], tmp_path: Path, options: str = "heads=2") -> Any:
    torch.save(payload, tmp_path / "x.pth")
    return load_encoder(f"{tmp_path}/x.pth#{options}")


def refuse(payload: dict[str, Any], tmp_path: Path, words: str, options: str = "heads=2") -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        load(payload, tmp_path, options)
    assert "\n" not in str(caught.value)
    assert "x.pth" in str(caught.value)


def test_every_single_key_is_needed(state: State, tmp_path: Path) -> None:
    load(state, tmp_path)
    for name in state:
        with pytest.raises(CheckpointError):
            load({k: v for k, v in state.items() if k != name}, tmp_path)


def test_missing_keys_are_named_and_counted(state: State, tmp_path: Path) -> None:
    del state["norm.weight"]
    refuse(state, tmp_path, r"does not fill the timm encoder: 1 missing \(norm.weight\)")
    few = {k: v for k, v in state.items() if "blocks.1.mlp" not in k and "blocks.1.norm" not in k}
    refuse(few, tmp_path, r"9 missing \(.*, \.\.\. 9 in all\)")


def test_left_over_keys_are_named_and_counted(state: State, tmp_path: Path) -> None:
    state["blocks.0.attn.q_norm.weight"] = torch.ones(12)
    state["extra"] = torch.ones(2)
    refuse(state, tmp_path, r"2 unexpected \(blocks.0.attn.q_norm.weight, extra\).*#arch=NAME")


def test_a_module_beside_the_blocks_can_be_left_out_by_name(state: State, tmp_path: Path) -> None:
    """As a fork of a method adds it to the encoder's own class."""
    extended = {**state, "gate.weight": torch.ones(2, 3), "scale": torch.ones(2)}
    refuse(extended, tmp_path, r"2 unexpected \(gate.weight, scale\); .* add #ignore=gate:scale")
    torch.save(extended, path := tmp_path / "fork.pth")
    with pytest.raises(CheckpointError, match=r"1 unexpected \(scale\); .* add #ignore=scale"):
        load_encoder(f"{path}#heads=2,ignore=gate")
    found, expected = load_encoder(f"{path}#heads=2,ignore=gate:scale"), load(state, tmp_path)
    assert found.info.dropped == {"gate.*": "ignored, as asked", "scale": "ignored, as asked"}
    assert found.fingerprint == expected.fingerprint


def test_what_is_inside_of_the_encoder_cannot_be_left_out(state: State, tmp_path: Path) -> None:
    extended = {**state, "blocks.0.adapter.weight": torch.ones(2, 3)}
    torch.save(extended, path := tmp_path / "fork.pth")
    with pytest.raises(CheckpointError, match=r"1 unexpected \(blocks.0.adapter.weight\)") as caught:
        load_encoder(f"{path}#heads=2")
    assert "#ignore" not in str(caught.value)
    for part in {name.partition(".")[0] for name in state}:
        with pytest.raises(CheckpointError, match=r"cannot be ignored|missing|position table"):
            load_encoder(f"{path}#heads=2,ignore={part}")


def test_other_shapes_are_named_with_both_shapes(state: State, tmp_path: Path) -> None:
    state[QKV] = torch.randn(72, 25)
    refuse(state, tmp_path, r"1 of another shape \(blocks.1.attn.qkv.weight \(72, 25\) for \(72, 24\)\)")


def test_a_missing_block_is_named(state: State, tmp_path: Path) -> None:
    renamed = {k.replace("blocks.1.", "blocks.2."): v for k, v in state.items()}
    refuse(renamed, tmp_path, "lacks block 1 of 3")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(state: State, value: float, tmp_path: Path) -> None:
    state[QKV][3, 4] = value
    refuse(state, tmp_path, f"{QKV} holds 1 NaN or infinite values")


def test_opposite_infinities_do_not_cancel(state: State, tmp_path: Path) -> None:
    state["norm.bias"][0], state["norm.bias"][1] = float("inf"), -float("inf")
    refuse(state, tmp_path, "norm.bias holds 2 NaN or infinite values")


def test_large_finite_values_are_not_mistaken_for_infinite(state: State, tmp_path: Path) -> None:
    state["norm.bias"][:] = 3e38
    assert load(state, tmp_path).info.loaded_tensors == len(state)


def test_nan_in_what_is_dropped_is_nobodys_business(state: State, tmp_path: Path) -> None:
    state["head.weight"] = torch.full((3, 24), float("nan"))
    assert "head.*" in load(state, tmp_path).info.dropped


def test_a_last_norm_of_zeros_is_refused_and_one_in_a_block_is_not(state: State, tmp_path: Path) -> None:
    state["blocks.1.norm2.weight"] = torch.zeros(24)
    load(state, tmp_path)
    state["norm.weight"] = torch.zeros(24)
    refuse(state, tmp_path, "norm.weight is 0.0 everywhere: all features would be the same")


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_weight_matrix_of_one_number_was_never_trained(state: State, value: float, tmp_path: Path) -> None:
    state[QKV] = torch.full_like(state[QKV], value)
    refuse(state, tmp_path, f"{QKV} is {value} everywhere")


def test_a_view_that_claims_more_than_it_has(state: State, tmp_path: Path) -> None:
    state[QKV] = torch.randn(1).expand(72, 24)
    refuse(state, tmp_path, "claims 1728 numbers but the file holds fewer")


def test_a_sibling_that_the_layout_does_not_know(state: State, tmp_path: Path) -> None:
    payload = {"model": state, "adapter": {"down.weight": torch.ones(2, 2)}}
    refuse(payload, tmp_path, "beside the encoder 'model' the file holds tensors .* does not know: adapter")


def below(path: str, state: State) -> State:
    return {f"{path}.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("lacking", ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight"])
def test_the_other_network_never_stands_in_for_one_that_is_not_complete(
    state: State, lacking: str, tmp_path: Path
) -> None:
    part, head = {k: v for k, v in state.items() if k != lacking}, {"head.weight": torch.ones(2)}
    payload = {
        "teacher": below("backbone", part) | head,
        "student": below("module.backbone", state) | below("module", head),
    }
    words = rf"'teacher.backbone' lacks {lacking}, which 'student.module.backbone' has; .* add #student$"
    refuse(payload, tmp_path, words)
    assert load(payload, tmp_path, "student,heads=2").info.container == "student.module.backbone"
    averaged = {"state_dict": state, "state_dict_ema": part}
    refuse(averaged, tmp_path, rf"'state_dict_ema' lacks {lacking}, .* add #state_dict$")
    assert load(averaged, tmp_path, "state_dict,heads=2").info.container == "state_dict"


def test_counters_and_random_states_beside_the_weights_are_left_out(state: State, tmp_path: Path) -> None:
    counter, rng = torch.tensor(5), torch.get_rng_state()
    averaged = {"n_averaged": counter, **below("module", state)}
    assert load(averaged, tmp_path).info.dropped == {"n_averaged": "number of the training"}
    payload = {"state_dict": state, "ema": averaged, "torch_rng_state": rng, "rng_states": [rng]}
    found = load(payload | {"cuda_rng_state": rng}, tmp_path).info
    assert found.container == "ema.module"
    assert found.dropped["ema.n_averaged"] == "number of the training"
    assert found.dropped["torch_rng_state.*"] == "training state"


def test_two_keys_of_one_name(state: State, tmp_path: Path) -> None:
    state["_orig_mod.norm.weight"] = state["norm.weight"]
    refuse(state, tmp_path, "two tensors of the file have one name, 'norm.weight'")


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (
            {"w": torch.ones(3, 3), "deep": {"b": torch.ones(2)}},
            r"layout is not known; it holds w \(3, 3\), deep.b \(2,\)",
        ),
        ({"epoch": 3}, "holds no weights"),
        ({}, "holds no weights"),
    ],
)
def test_an_unknown_layout_shows_what_is_there(payload: dict[str, Any], words: str, tmp_path: Path) -> None:
    refuse(payload, tmp_path, words)


def test_position_tables_that_are_no_square(state: State, tmp_path: Path) -> None:
    state["pos_embed"] = torch.randn(1, 13, 24)
    refuse(state, tmp_path, "13 rows, which is no square grid")
    del state["pos_embed"]
    refuse(state, tmp_path, "no position table")


def test_patches_that_are_not_square_rgb(state: State, tmp_path: Path) -> None:
    state["patch_embed.proj.weight"] = torch.randn(24, 1, 8, 8)
    refuse(state, tmp_path, r"shape \(24, 1, 8, 8\); expected \(D, 3, p, p\)")


def test_a_named_model_that_is_another(state: State, tmp_path: Path) -> None:
    refuse(
        state, tmp_path, "holds no encoder in the layout of timm's test_resnet", options="arch=test_resnet"
    )
    nearly = create_timm("test_vit", pretrained=False).state_dict()
    nearly["norm.weight"] = torch.ones(3)
    refuse(nearly, tmp_path, "does not fill the timm encoder: 1 of another shape", options="arch=test_vit")
    refuse(state, tmp_path, "has no model 'test_vip'", options="arch=test_vip")
    refuse(nearly, tmp_path, "has its own number of heads", options="arch=test_vit,heads=2")


def test_a_family_can_be_asked_for(state: State, tmp_path: Path) -> None:
    refuse(state, tmp_path, "no encoder in the layout of Latent MIM", options="family=latent_mim")
    refuse(state, tmp_path, "no checkpoint family 'maw'. Did you mean 'mae'", options="family=maw")
    assert load(state, tmp_path, "family=timm,heads=2").spec.family == "timm"


def test_the_fingerprint_follows_every_weight(state: State, tmp_path: Path) -> None:
    first = load(state, tmp_path)
    assert load(state, tmp_path).fingerprint == first.fingerprint
    wrapped = load({"state_dict": state, "epoch": 3}, tmp_path)
    assert wrapped.fingerprint == first.fingerprint
    assert wrapped.info.sha256 != first.info.sha256
    for name in ("pos_embed", QKV, "norm.bias"):
        changed = {k: v.clone() for k, v in state.items()}
        changed[name].view(-1)[-1] += 1e-3
        assert load(changed, tmp_path).fingerprint != first.fingerprint


# ------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"])
def test_a_tensor_of_no_shape_is_one_line_that_names_it(state: State, name: str, tmp_path: Path) -> None:
    state[name] = torch.tensor(1.0)
    with pytest.raises(CheckpointError, match=name) as caught:
        load(state, tmp_path)
    assert "\n" not in str(caught.value)


def test_what_a_draft_stumbles_over_is_one_line_with_its_cause(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draft(root: Root, tensors: State, heads: int | None) -> Any:
        return tensors["norm.weight"].shape[3]

    broken = Family(name="mine", title="Mine", rank=9, anchors=ANCHORS, draft=draft)
    monkeypatch.setattr(loading, "families", lambda: (broken,))
    words = r"does not make the layout mine: .* \(IndexError\); .* looked at last is norm.weight \(24,\)"
    refuse(state, tmp_path, words)
    del state["norm.weight"]
    refuse(state, tmp_path, "the file has no norm.weight, which the layout mine needs")
    with pytest.raises(CheckpointError) as caught:
        load(state, tmp_path)
    assert caught.value.__cause__ is not None
    assert isinstance(caught.value.__cause__.__cause__, KeyError)


def test_flat_parts_of_weights_are_refused(state: State, tmp_path: Path) -> None:
    flat = {name: tensor.reshape(-1) for name, tensor in state.items()}
    refuse(flat, tmp_path, "all tensors are flat, as the parts that FSDP keeps; save a full state dict")


@pytest.mark.parametrize("layer", ["blocks.0.mlp.fc2", "blocks.0.attn.qkv"])
def test_an_adapter_has_to_be_merged(state: State, layer: str, tmp_path: Path) -> None:
    adapted = {name.replace(f"{layer}.", f"{layer}.base_layer."): tensor for name, tensor in state.items()}
    adapted[f"{layer}.lora_A.default.weight"] = torch.ones(2, 24)
    refuse(adapted, tmp_path, r"adapter beside the weights \(.*\); merge the adapter first \(PEFT")


def test_tensors_of_other_classes_are_refused(state: State) -> None:
    class DTensor(torch.Tensor):
        pass

    state["norm.bias"] = torch.zeros(24).as_subclass(DTensor)
    with pytest.raises(CheckpointError, match=r"model.norm.bias is a DTensor, .* \(of DTensor: full_tensor"):
        grow_tree({"model": state})


# ------------------------------------------------------------------------------------------- families


def named(name: str, rank: int) -> Family:
    return Family(name=name, title=name, rank=rank, anchors=ANCHORS, draft=plain_draft(name))


def test_the_most_specific_family_wins_and_a_tie_is_refused(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "families", lambda: (named("special", 7), named("general", 3)))
    assert load(state, tmp_path).spec.family == "special"
    monkeypatch.setattr(loading, "families", lambda: (named("one", 7), named("two", 7)))
    refuse(state, tmp_path, "could be any of one, two; choose with #family=one")
    assert load(state, tmp_path, "family=two,heads=2").spec.family == "two"


class Entry:
    """An entry point as importlib.metadata gives it."""

    def __init__(self, name: str, loaded: object) -> None:
        self.name, self.value, self._loaded = name, f"package:{name}", loaded

    def load(self) -> object:
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


def test_other_packages_add_families(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_entries(*entries: Entry) -> tuple[Family, ...]:
        monkeypatch.setattr(loading, "entry_points", lambda group: entries)
        found: tuple[Family, ...] = loading.families.__wrapped__()
        return found

    assert with_entries(Entry("x", named("third-party", 99)))[0].name == "third-party"
    with pytest.warns(UserWarning, match=r"'x' \(package:x\) is skipped: no such thing"):
        assert "mae" in [family.name for family in with_entries(Entry("x", ImportError("no such thing")))]
    with pytest.raises(CheckpointError, match=r"'x' \(package:x\) is not a checkpoint family"):
        with_entries(Entry("x", 3))
    with pytest.raises(CheckpointError, match="two checkpoint families are called 'mae'"):
        with_entries(Entry("x", named("mae", 99)))


def test_families_are_whole() -> None:
    for family in loading.families():
        assert family.title
        assert all(family.drop.values())
        assert all(family.siblings.values())


def test_families_are_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    for family in loading.families():
        default = f"`{family.prefer[0]}`" if family.prefer else "the only one"
        known = f"`{family.name}` | {family.title} | {family.known_by}"
        assert f"| {known} | {default} | {family.evaluated} | {family.source} |" in text


def test_prefixes_are_whole_components() -> None:
    keys = ("submodule.a", "x._orig_mod.b", "module.c", "_orig_module.d")
    tree = grow_tree({key: torch.ones(1) for key in keys})
    assert list(tree.tensors) == ["submodule.a", "x.b", "module.c", "_orig_module.d"]
    root = Root("module.", {"c": torch.ones(1)}, tree)
    assert list(root.siblings()) == ["submodule", "x", "_orig_module"]


# ------------------------------------------------------------------------------------------- kinds of numbers


def vit_state() -> dict[str, torch.Tensor]:
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=1, num_heads=3, num_classes=0)
    return model.state_dict()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_floats_of_other_widths_are_converted_and_noted(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in vit_state().items()}
    torch.save(state, tmp_path / "x.pth")
    encoder: Any = load_encoder(str(tmp_path / "x.pth"))
    assert f"weights converted from {str(dtype)[6:]} to float32" in encoder.info.notes
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, state[name].float())


def spoiled(name: str) -> tuple[Any, str]:
    weight = vit_state()["blocks.0.attn.proj.weight"]
    nan = weight.clone()
    nan[3, 4] = float("nan")
    return {
        "NaN": (nan, "1 NaN or infinite values"),
        "infinite": (weight / 0, "NaN or infinite values"),
        "NaN in 8 bits": (nan.to(torch.float8_e4m3fn), "1 NaN or infinite values"),
        "constant": (torch.zeros_like(weight), "0.0 everywhere; these weights were never trained"),
        "int8": (weight.mul(100).to(torch.int8), "int8 numbers: quantised weights"),
        "meta": (weight.to("meta"), "no values"),
        "sparse": (weight.to_sparse(), "sparse tensor"),
        "empty": (weight[:0], "another shape"),
        "expanded": (torch.ones(1).expand(192, 192), "fewer; it is refused|everywhere"),
        "complex": (weight.to(torch.complex64), "complex64 numbers"),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "NaN",
        "infinite",
        "NaN in 8 bits",
        "constant",
        "int8",
        "meta",
        "sparse",
        "empty",
        "expanded",
        "complex",
    ],
)
def test_weights_that_are_none_are_refused(name: str, tmp_path: Path) -> None:
    tensor, words = spoiled(name)
    torch.save({"model": vit_state() | {"blocks.0.attn.proj.weight": tensor}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=words) as caught:
        load_encoder(str(tmp_path / "x.pth"))
    assert "blocks.0.attn.proj.weight" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = torch.quantize_per_tensor(torch.randn(192, 192), 0.1, 0, torch.qint8)
        torch.save({"model": vit_state() | {"blocks.0.attn.proj.weight": weight}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="quantised weights"):
        load_encoder(str(tmp_path / "x.pth"))
