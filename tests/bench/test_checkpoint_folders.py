"""Folders as checkpoints: configuration beside weights, shards with an index, torch's distributed format."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from lmim_bench.bench.checkpoints import open_checkpoint
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import CheckpointError
from lmim_bench.bench.types import Tap

State = dict[str, torch.Tensor]
ONE = {"a": torch.arange(6.0).reshape(2, 3)}
TWO = {"b": torch.ones(4), "c": torch.zeros(2, dtype=torch.bfloat16)}


def refuse(path: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


def equal(found: Any, expected: State) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


# ------------------------------------------------------------------------------------------- one file


@pytest.mark.parametrize("name", ["model.safetensors", "open_clip_model.safetensors", "whatever.safetensors"])
def test_a_folder_with_one_file_of_weights(name: str, tmp_path: Path) -> None:
    save_file(ONE, tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    found = open_checkpoint(tmp_path)
    equal(found.payload, ONE)
    assert found.config == {"model_type": "vit"}
    assert found.path == tmp_path / name


def test_safetensors_are_preferred_to_a_pickle(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "model.safetensors")
    torch.save(TWO, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).format == "safetensors"
    (tmp_path / "model.safetensors").unlink()
    equal(open_checkpoint(tmp_path).payload, TWO)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_shards_of_an_earlier_save_are_passed_over(name: str, tmp_path: Path) -> None:
    for content, path in ((TWO, tmp_path / f"shard-{name}"), (ONE, tmp_path / name)):
        (save_file if name.endswith(".safetensors") else torch.save)(content, path)
    index = tmp_path / f"{name}.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(TWO, f"shard-{name}")}))
    equal(open_checkpoint(tmp_path).payload, ONE)
    equal(open_checkpoint(index).payload, TWO)


def test_folders_that_leave_a_choice_or_hold_nothing(tmp_path: Path) -> None:
    refuse(tmp_path, "holds no file of weights")
    torch.save(ONE, tmp_path / "epoch_1.pth")
    torch.save(ONE, tmp_path / "epoch_2.pth")
    refuse(tmp_path, r"several files of weights \(epoch_1\.pth, epoch_2\.pth\); give one")


@pytest.mark.parametrize(
    "names",
    [
        ["zero_pp_rank_0_mp_rank_00_model_states.pt"],
        ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"],
        ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"],
        ["model.rank_3.pth"],
    ],
)
def test_partitioned_states_are_refused_with_the_way_out(names: list[str], tmp_path: Path) -> None:
    for name in names:
        torch.save(ONE, tmp_path / name)
    refuse(tmp_path, "partitioned state of a training.*merge it where it was trained")


@pytest.mark.parametrize(
    "kept",
    [
        ("model.safetensors", "model_1.safetensors"),
        ("pytorch_model.bin", "pytorch_model_1.bin", "pytorch_model_2.bin"),
    ],
)
def test_several_models_of_accelerate_are_never_one(kept: tuple[str, ...], tmp_path: Path) -> None:
    for name in kept:
        (save_file if name.endswith(".safetensors") else torch.save)(ONE, tmp_path / name)
    refuse(tmp_path, rf"weights of several models \({', '.join(kept)}\), .*; give one of the files")
    assert open_checkpoint(tmp_path / kept[-1]).path == tmp_path / kept[-1]


def test_the_whole_weights_that_deepspeed_keeps_beside_its_parts(tmp_path: Path) -> None:
    step = tmp_path / "global_step100"
    step.mkdir()
    torch.save({"module": ONE}, step / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, step / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    equal(open_checkpoint(step).payload["module"], ONE)
    refuse(tmp_path, "holds no file of weights")
    (tmp_path / "latest").write_text("global_step100\n")
    equal(open_checkpoint(tmp_path).payload["module"], ONE)
    assert open_checkpoint(tmp_path).path == step / "mp_rank_00_model_states.pt"
    for other in ("global_step7", "../" + tmp_path.name + "/global_step100", "", "."):
        (tmp_path / "latest").write_text(other)
        refuse(tmp_path, "holds no file of weights")


def test_the_folder_that_lightning_makes_of_deepspeeds(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    torch.save({"module": ONE}, tmp_path / "checkpoint" / "mp_rank_00_model_states.pt")
    equal(open_checkpoint(tmp_path).payload["module"], ONE)


def test_hf_wants_a_config(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no folder with a config\.json; download one first"):
        load_encoder(f"hf:{tmp_path}")


# ------------------------------------------------------------------------------------------- shards


def shards(folder: Path, mapping: dict[str, str]) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": mapping}))
    return index


def test_shards_are_one_checkpoint_by_folder_or_index(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "model-1.safetensors")
    save_file(TWO, tmp_path / "model-2.safetensors")
    index = shards(
        tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    )
    for path in (tmp_path, index):
        equal(open_checkpoint(path).payload, ONE | TWO)
    before = open_checkpoint(index).sha256
    save_file(TWO | {"b": torch.zeros(4)}, tmp_path / "model-2.safetensors")
    assert open_checkpoint(index).sha256 != before


def test_pickled_shards(tmp_path: Path) -> None:
    torch.save(ONE, tmp_path / "p1.bin")
    torch.save(TWO, tmp_path / "p2.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "p1.bin", "b": "p2.bin", "c": "p2.bin"}}))
    equal(open_checkpoint(tmp_path).payload, ONE | TWO)


def test_an_index_that_does_not_agree_with_its_shards(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "m1.safetensors")
    refuse(
        shards(tmp_path, {"a": "m1.safetensors", "b": "m2.safetensors"}),
        r"m2\.safetensors.*is not there.*1 of 2",
    )
    refuse(shards(tmp_path, {"a": "m1.safetensors", "z": "m1.safetensors"}), "it lacks z")
    save_file(ONE | TWO, tmp_path / "m1.safetensors")
    refuse(shards(tmp_path, {"a": "m1.safetensors"}), "it has b, which is not listed")
    refuse(shards(tmp_path, {"a": "../m1.safetensors"}), "outside of its folder")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refuse(tmp_path, "no index of shards|not an index of shards")


# ------------------------------------------------------------------------------------------- distributed


def save_dcp(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)


def test_a_distributed_checkpoint_as_torch_saves_it(tmp_path: Path) -> None:
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=192, depth=1, num_heads=3, num_classes=0
    ).eval()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    save_dcp(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "step"
    )
    container = open_checkpoint(tmp_path / "step")
    assert container.format == "dcp"
    equal(container.payload["model"], model.state_dict())
    # The state of the optimizer is not even read.
    assert all(t.is_meta for t in container.payload["optimizer"].values())
    encoder = load_encoder(str(tmp_path / "step"))
    assert "optimizer.*" in encoder.info.dropped
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model.forward_features(x)[:, 0]
    torch.testing.assert_close(encoder(x)[Tap()].cls, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match=r"did you mean .*step"):
        load_encoder(str(tmp_path))


def sharded(folder: Path, parts: list[tuple[tuple[int, int], torch.Tensor]], size: tuple[int, int]) -> Path:
    """A checkpoint of one tensor in pieces, by torch's own classes."""
    from torch.distributed.checkpoint import metadata as m
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    folder.mkdir(exist_ok=True)
    storage, chunks, offset = {}, [], 0
    with (folder / "__0_0.distcp").open("wb") as stream:
        for i, (where, part) in enumerate(parts):
            torch.save(part.clone(), stream)
            index = m.MetadataIndex("w", torch.Size(where), i)
            storage[index] = _StorageInfo("__0_0.distcp", offset, stream.tell() - offset)
            offset = stream.tell()
            chunks.append(m.ChunkStorageMetadata(torch.Size(where), part.shape))
    entry = m.TensorStorageMetadata(m.TensorProperties(), torch.Size(size), chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(m.Metadata({"w": entry}, storage_data=storage)))
    return folder


def test_pieces_are_put_together(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    parts = [((2, 0), whole[2:]), ((0, 0), whole[:2, :3]), ((0, 3), whole[:2, 3:])]
    equal(open_checkpoint(sharded(tmp_path / "x", parts, (4, 6))).payload, {"w": whole})


def test_missing_overlapping_and_outlying_pieces_are_refused(tmp_path: Path) -> None:
    top, bottom = torch.ones(2, 6), torch.ones(2, 6)
    refuse(sharded(tmp_path / "x", [((0, 0), top)], (4, 6)), "w is not covered by its pieces")
    refuse(sharded(tmp_path / "x", [((0, 0), top), ((0, 0), bottom)], (4, 6)), "w is not covered")
    refuse(sharded(tmp_path / "x", [((0, 0), top), ((3, 0), bottom)], (4, 6)), "outside of it")
    folder = sharded(tmp_path / "x", [((0, 0), top), ((2, 0), bottom)], (4, 6))
    (folder / "__0_0.distcp").unlink()
    refuse(folder, "lacks __0_0.distcp, which holds w")


class Payload:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_no_table_of_contents_runs_code(protocol: int, tmp_path: Path) -> None:
    from torch.distributed.checkpoint import metadata as m

    mark = tmp_path / "mark"
    touch = f"open({str(mark)!r}, 'w').close()"
    evil = {"eval": Payload(eval, touch), "system": Payload(os.system, f"touch {mark}")}
    for name, payload in evil.items():
        folder = tmp_path / name
        folder.mkdir()
        contents = m.Metadata({"w": payload}, planner_data=payload)
        (folder / ".metadata").write_bytes(pickle.dumps(contents, protocol=protocol))
        refuse(folder, r"not safe \(it names [\w.]+\)")
        assert not mark.exists()
    # The same payload does run where a table is read as torch reads it.
    pickle.loads(pickle.dumps(evil["eval"], protocol=protocol))
    assert mark.exists()


def test_a_piece_that_names_code_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    part: Any = Payload(eval, f"open({str(mark)!r}, 'w').close()")
    part.shape, part.clone = torch.Size((2, 2)), lambda: part
    refuse(sharded(tmp_path / "x", [((0, 0), part)], (2, 2)), "w in .* cannot be read")
    assert not mark.exists()


def test_tables_that_are_none(tmp_path: Path) -> None:
    for content in (b"", b"\x80\x04.", b"garbage", pickle.dumps({"a": 1}), pickle.dumps([1, 2])):
        (tmp_path / ".metadata").write_bytes(content)
        refuse(tmp_path, "table of contents")
