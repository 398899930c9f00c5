"""An export that is read here again gives the global feature of the encoder that it was made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from lmim_bench.bench.checkpoints.exported import as_exported
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import CheckpointError
from lmim_bench.bench.export import export_encoder
from lmim_bench.bench.types import Encoder, Pooling, Tap
from lmim_bench.bench.vit import vit_spec

SIDE = 32


def pooled(encoder: Encoder) -> torch.Tensor:
    """The global feature by the encoder's own spec, as the tasks read it."""
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9))
    found = encoder(x, (Tap(-1, encoder.spec.final_norm),))[Tap(-1, encoder.spec.final_norm)]
    parts = {"cls": [found.cls], "mean": [found.mean], "cls+mean": [found.cls, found.mean]}
    return torch.cat([part for part in parts[encoder.spec.pooling] if part is not None], dim=1)


@pytest.mark.parametrize("form", ["timm", "hf"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean"])
@pytest.mark.parametrize("final_norm", [True, False])
def test_the_global_feature_comes_back(
    form: Any, pooling: Pooling, final_norm: bool, tmp_path: Path, save_vit: Callable[..., str]
) -> None:
    source = save_vit(
        tmp_path / "x.pth", pooling=pooling, final_norm=final_norm, mean=(0.1, 0.2, 0.3), crop_pct=0.8
    )
    weights = export_encoder(source, form, tmp_path / "out").paths[0]
    for reference in (weights, weights.parent):
        old, new = load_encoder(source), load_encoder(str(reference))
        own = {"family", "arch", "pos_interpolation"}  # what depends on the layout
        assert new.spec.model_dump(exclude=own) == old.spec.model_dump(exclude=own)
        torch.testing.assert_close(pooled(new), pooled(old))
    asked = load_encoder(f"{weights.parent}#pooling=mean,final_norm=true").spec
    assert (asked.pooling, asked.final_norm) == ("mean", True)


def test_timm_passes_over_the_entry(tmp_path: Path, save_vit: Callable[..., str]) -> None:
    export_encoder(save_vit(tmp_path / "x.pth", pooling="mean", final_norm=False), "timm", tmp_path / "out")
    found = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).state_dict()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers_passes_over_the_entry(tmp_path: Path, save_vit: Callable[..., str]) -> None:
    transformers = pytest.importorskip("transformers")
    export_encoder(save_vit(tmp_path / "x.pth", pooling="mean", final_norm=False), "hf", tmp_path / "out")
    model, report = transformers.ViTModel.from_pretrained(
        tmp_path / "out", add_pooling_layer=False, output_loading_info=True
    )
    assert model.config.model_type == "vit"
    assert not any(report.values())


def test_a_file_of_another_program_keeps_the_pooling_of_its_family(
    tmp_path: Path, save_vit: Callable[..., str]
) -> None:
    source = save_vit(tmp_path / "x.pth", pooling="mean", final_norm=False)
    export_encoder(source, "hf", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("lmim_bench") == {"pooling": "mean", "final_norm": False}
    path.write_text(json.dumps(config))
    spec = load_encoder(str(tmp_path / "out")).spec
    assert (spec.pooling, spec.final_norm) == ("cls", True)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"pooling": "max", "final_norm": True}, "lmim_bench in config.json is not valid: pooling"),
        ({"pooling": "cls"}, "is not valid: final_norm"),
        (["cls"], "is not valid"),
        ({"pooling": "cls", "final_norm": True}, "no class token"),
    ],
)
def test_an_entry_that_cannot_be_is_refused(entry: Any, words: str) -> None:
    shape = {"embed_dim": 48, "depth": 2, "num_heads": 4, "patch_size": 8, "image_size": SIDE}
    spec = vit_spec("lmim-bench", **shape, class_token=False, pooling="mean")
    with pytest.raises(CheckpointError, match=words):
        as_exported(spec, {"lmim_bench": entry})
