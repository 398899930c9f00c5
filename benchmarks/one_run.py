"""One `run` of several tasks against the same tasks run alone, each in a process and with a cache of its own.

The scores of both are the same. What is shared is the pass of the encoder over images that several tasks
read, so the ratio depends on how much of the time that is: the table says which tasks and how many images.
Also the second run of the same command, which finds all its cells.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _peer_code import Spread, options, start

TASKS = ("knn", "linear", "few_shot", "unsup_seg", "vos")


def main() -> None:
    parser = options(__doc__, peers=False, limit=2000)
    parser.add_argument("--ckpt", default="timm:vit_small_patch16_224", help="[timm:vit_small_patch16_224]")
    parser.add_argument("--data", action="append", help="as for run, repeats [the embedded sets]")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated [the five scored ones]")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="as for run, repeats")
    args = parser.parse_args()
    facts = start(args)
    tasks = args.tasks.split(",")
    root = Path(tempfile.mkdtemp(prefix="one-run-"))

    def scored(names: list[str], out: Path) -> float:
        """Seconds of the command, as a user waits for it."""
        sets = [one for one in args.sets if one.partition(".")[0] in names]
        command = [sys.executable, "-m", "lmim_bench", "run", "--ckpt", args.ckpt, "--tasks", ",".join(names)]
        command += ["--limit", str(args.limit), "--out", str(out), "--cache-dir", str(out / "cache")]
        command += [part for one in args.data or [] for part in ("--data", one)]
        command += [part for one in sets for part in ("--set", one)]
        begun = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=root)
        return time.perf_counter() - begun

    def scores(out: Path) -> dict[str, Any]:
        found = json.loads((out / "results.json").read_text(encoding="utf-8"))["results"]
        return {result["task"]: result["scores"] for result in found}

    together, alone, again = [], [], []
    try:
        for number in range(args.rounds):
            out = root / f"{number}-all"
            together.append(scored(tasks, out))
            again.append(scored(tasks, out))
            apart = {task: root / f"{number}-{task}" for task in tasks}
            seconds = {task: scored([task], folder) for task, folder in apart.items()}
            alone.append(sum(seconds.values()))
            whole = scores(out)
            for task, folder in apart.items():
                assert scores(folder)[task] == whole[task], f"{task} scores otherwise alone"
            parts = ", ".join(f"{task} {taken:.1f} s" for task, taken in seconds.items())
            print(f"together {together[-1]:.1f} s, again {again[-1]:.2f} s; alone: {parts}", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    ratios = [one / all_ for one, all_ in zip(alone, together, strict=True)]
    print(
        f"alone {Spread.of(alone)} s, together {Spread.of(together)} s, alone / together {Spread.of(ratios)}"
    )
    print(f"the second run of the same command: {Spread.of(again)} s")
    if args.json:
        found = {"together": together, "alone": alone, "again": again}
        args.json.write_text(json.dumps({**facts, **found}, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
