"""The benchmarks' reading of a profile: what ran on the device, for how long, and what it waited for."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def profiles(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("_profile")


def event(cat, name, ts, dur):
    return {"cat": cat, "name": name, "ts": ts, "dur": dur}


def test_kernels_are_added_up_by_kind_and_overlaps_count_once(profiles):
    events = [
        event("kernel", "nvjet_sm90_tst_256x128", 1000.0, 400.0),
        event("cpu_op", "aten::mm", 0.0, 9000.0),
        # 200 side by side, and then 300 of nothing.
        event("kernel", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop", 1200.0, 400.0),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1900.0, 100.0),
        event("kernel", "triton_poi_fused_gelu_8", 2000.0, 500.0),
        event("kernel", "nvjet_sm90_tst_256x128", 2500.0, 500.0),
        {"ph": "M", "name": "process_name"},
    ]
    found = profiles.summarise("ours", profiles.read_kernels(events), steps=2)
    assert (found.step, found.busy) == (1.0, 0.85)
    assert found.kinds == {
        "matrix products": 0.45,
        "attention": 0.2,
        "fused by the compiler": 0.25,
        "copies": 0.05,
    }
    assert found.counted == pytest.approx(0.65)
    assert found.top["nvjet_sm90_tst_256x128"] == 0.45
    assert found.waits["Memcpy HtoD (Pinned -> Device)"] == 0.15
    assert sum(found.waits.values()) == pytest.approx(found.step - found.busy)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdam>", "optimiser and EMA"),
        ("triton_tem_fused_mm_3", "matrix products"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_clone_4", "fused by the compiler"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other"),
        ("void (anonymous namespace)::softmax_warp_forward", "softmax"),
        ("vectorized_layer_norm_kernel", "norms"),
    ],
)
def test_kinds(profiles, name, kind):
    assert profiles.kind_of(name) == kind
