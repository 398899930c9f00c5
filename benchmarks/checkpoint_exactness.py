"""How far our features are from those of the original code, for every recorded checkpoint.

    python benchmarks/checkpoint_exactness.py

Each row is a small model with random weights, built and run by its own repository and saved as its trainer
does (tests/checkpoints). Here it is loaded without any option, and its features are compared: the largest
absolute difference at the model's own image size and, where the original takes one, at a larger size, in
fp32 on the CPU.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch

from lmim_bench.bench.encoders import load_encoder


def layouts() -> ModuleType:
    path = Path(__file__).parents[1] / "tests" / "checkpoints" / "layouts.py"
    spec = importlib.util.spec_from_file_location("layouts", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    sys.modules["layouts"] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    torch.set_num_threads(1)
    recorded, worst, wrong = layouts(), 0.0, []
    print("| recording | read as | original code | own size | larger size |\n|---|---|---|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name in recorded.names():
            reference, layout = recorded.write(name, Path(folder))
            encoder = load_encoder(reference)
            found: dict[str, float] = {}
            for key, difference in recorded.differences(layout, encoder):
                size = key.partition("/")[0]
                found[size] = max(found.get(size, 0.0), difference)
            worst = max(worst, *found.values())
            if max(found.values()) > recorded.tolerance(encoder):
                wrong.append(name)
            cells = []
            for size in ("native", "larger"):
                height, width = layout.sizes.get(size, (0, 0))
                cells.append(f"{found[size]:.1e} ({height}x{width})" if size in found else "not possible")
            print(f"| {name} | `{encoder.spec.family}` | {layout.made_by} | {' | '.join(cells)} |")
    print(f"\nlargest difference {worst:.1e}; beyond the tolerance: {', '.join(wrong) or 'none'}")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
