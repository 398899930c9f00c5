"""Time and memory of loading a ViT-L checkpoint: ours against plain ``torch.load`` into timm's model.

    python benchmarks/checkpoint_load.py [--rounds 3] [--arch vit_large_patch16_224] [--folder DIR]

Each side runs in processes of its own, in turn, on one thread. Ours also checks every byte (checksums of the
archive, SHA-256, a finite value for every weight), which the plain way does not. The peak is that of resident
memory, pages of mapped files included, beyond what importing torch and timm takes (Linux). Files: the weights
alone, the weights beside the state of an optimizer (AdamW: two more tensors of each shape), and safetensors.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OURS = """
from lmim_bench.bench.encoders import load_encoder
clock()
encoder = load_encoder(path)
parts = encoder.model.state_dict()
"""
PLAIN = """
import timm, torch
from safetensors.torch import load_file
clock()
model = timm.create_model(arch, num_classes=0)
safe = path.endswith(".safetensors")
payload = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
model.load_state_dict(payload.get("model", payload), strict=True)
parts = model.state_dict()
"""
FRAME = """
import json, pathlib, sys, time
path, arch = sys.argv[1:]
import timm, torch, lmim_bench.bench.encoders, safetensors.torch
torch.set_num_threads(1)

def peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

def clock():
    global start, before
    start, before = time.perf_counter(), peak()
{body}
seconds = time.perf_counter() - start
size = sum(t.numel() * t.element_size() for t in parts.values()) / 2**20
total = float(sum(t.double().sum() for t in parts.values() if t.is_floating_point()))
print(json.dumps(dict(seconds=seconds, peak=peak() - before, size=size, total=total)))
"""


def measure(body: str, path: Path, arch: str) -> dict[str, float]:
    code = FRAME.replace("{body}", body)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), arch], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_files(folder: Path, arch: str, seed: int) -> dict[str, Path]:
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    state = timm.create_model(arch, num_classes=0).state_dict()
    state = {name: torch.randn_like(t) * 0.02 if t.is_floating_point() else t for name, t in state.items()}
    moments = {i: {"exp_avg": t.clone(), "exp_avg_sq": t.clone()} for i, t in enumerate(state.values())}
    paths = {name: folder / file for name, file in FILES.items()}
    torch.save({"model": state}, paths["weights"])
    torch.save({"model": state, "optimizer": {"state": moments}, "epoch": 1}, paths["with optimizer"])
    save_file(state, paths["safetensors"])
    return paths


FILES = {
    "weights": "weights.pth",
    "with optimizer": "training.pth",
    "safetensors": "weights.safetensors",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arch", default="vit_large_patch16_224")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the files are written [a temporary folder]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        paths = write_files(Path(folder), args.arch, args.seed)
        print(f"{args.arch}, {args.rounds} rounds, seed {args.seed}, {platform.machine()}")
        print("file            MB     side   seconds (range)        peak MB  peak / encoder")
        for name, path in paths.items():
            rows: dict[str, list[dict[str, Any]]] = {"plain": [], "ours": []}
            for _ in range(args.rounds):
                for side, body in (("plain", PLAIN), ("ours", OURS)):
                    rows[side].append(measure(body, path, args.arch))
            totals = {round(row["total"], 3) for found in rows.values() for row in found}
            assert len(totals) == 1, "the two sides loaded different weights"
            for side, found in rows.items():
                seconds = sorted(row["seconds"] for row in found)
                peak = statistics.median(row["peak"] for row in found)
                print(
                    f"{name:<15} {path.stat().st_size / 2**20:<6.0f} {side:<6} "
                    f"{statistics.median(seconds):5.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f})"
                    f"{'':<8}{peak:7.0f}  {peak / found[0]['size']:.2f}"
                )
            pairs = zip(rows["plain"], rows["ours"], strict=True)
            ratio = statistics.median(plain["seconds"] / ours["seconds"] for plain, ours in pairs)
            print(f"{'':<22} plain / ours: time {ratio:.2f}x")


if __name__ == "__main__":
    main()
