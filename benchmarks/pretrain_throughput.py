"""Images per second in training: ours against the official MAE and Latent MIM code, in one process.

Theirs is their own ``train_one_epoch``, imported from checkouts that the user brings (``--peers``); none of
it is copied here. Nothing is timed before both are shown to compute the same losses and gradients from the
same weights, images and masks. See README.md beside this file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import torch
from _patches import PATCHES
from _peers import OFFICIAL, Agreement, Official, Theirs, check
from _profile import Profile, product_peak, profile_side
from _timing import Ours, Side, Speed, Spread, ratios, release, time_sides
from timm.layers import use_fused_attn

from lmim_bench.bench.engine import resolve_device
from lmim_bench.bench.environment import environment
from lmim_bench.bench.errors import LmimBenchError
from lmim_bench.pretrain.api import describe_cost, pretrain
from lmim_bench.pretrain.engine import peak_flops, resolve_precision
from lmim_bench.pretrain.flops import training_flops
from lmim_bench.pretrain.logbook import read_metrics
from lmim_bench.pretrain.recipe import Recipe, load_recipe, make_recipe

SIZES = {
    "cuda": ("model.arch=vit_base", "data.image_size=224", "optim.batch_size=256"),
    "cpu": (  # the recipes' decoder and projector would outweigh a small encoder
        "model.arch=vit_tiny",
        "model.patch_size=8",
        "data.image_size=64",
        "decoder.width=192",
        "decoder.num_heads=6",
        "projector.hidden_dim=768",
        "optim.batch_size=16",
    ),
}
STEPS = {"cuda": 20, "cpu": 2}
PROFILED = 3
"""Steps of a profile."""


@dataclass(frozen=True)
class Comparison:
    """What is known of a recipe.

    Attributes:
        recipe: as it was run.
        flops: of an image, counted once for both sides.
        peak: of the device, FLOP/s; None on the CPU, and in fp32, of which its 16-bit peak says nothing.
        speeds: of ``ours`` and, where the official code is there, ``theirs``; on a GPU also ``as published``,
            without the fused attention that current timm gives it.
        ratios: of ours to each other side.
        profiles: where a step of each side spends its time, where that was asked for.
    """

    recipe: dict[str, Any]
    flops: float
    peak: float | None
    official: dict[str, str | None] | None
    agreement: Agreement | None
    speeds: dict[str, Speed]
    ratios: dict[str, Spread]
    profiles: dict[str, Profile]


def compare(
    recipe: Recipe, official: Official | None, steps: int, repeats: int, profiled: bool = False
) -> Comparison:
    """Check, then time; ours alone where there is no official code.

    Raises:
        ClickException: the two do not compute the same.
    """
    agreement = agree(official, recipe) if official else None
    device = torch.device(recipe.engine.device)
    precision = resolve_precision(recipe.engine, device.type)
    images = torch.randn(recipe.optim.batch_size, 3, recipe.crop_size, recipe.crop_size, device=device)
    builders: dict[str, Callable[[], Side]] = {"ours": lambda: Ours(recipe, images)}
    if official is not None:
        builders["theirs"] = lambda: Theirs(official, recipe, images, precision)
        if official.gains_fused_attention and use_fused_attn() and device.type == "cuda":
            builders["as published"] = lambda: Theirs(official, recipe, images, precision, fused=False)
    profiles: dict[str, Profile] = {}

    def look(name: str, side: Side) -> None:
        found = profile_side(side, PROFILED, device)
        if found is None:
            click.echo(f"{recipe.name}, {side.label}: the profiler saw no kernel")
        else:
            profiles[name] = found

    speeds = time_sides(builders, images, steps, repeats, look if profiled else None)
    release(device)
    return Comparison(
        recipe=recipe.model_dump(mode="json"),
        flops=training_flops(recipe),
        peak=None if precision == "fp32" else peak_flops(device),
        official=official.version() if official else None,
        agreement=agreement,
        speeds=speeds,
        ratios=ratios(speeds),
        profiles=profiles,
    )


def agree(official: Official, recipe: Recipe) -> Agreement:
    found = check(official, recipe)
    click.echo(
        f"{recipe.name}: same weights, images and masks in fp32: loss ours {found.loss_ours:.7f}, official "
        f"{found.loss_theirs:.7f}, apart {found.losses_apart:.1e}; gradients apart "
        f"{found.gradients_apart:.1e} of their length"
    )
    if not found.good:
        raise click.ClickException(f"{recipe.name}: ours and {official.repository} differ; nothing is timed")
    return found


@dataclass(frozen=True)
class Loop:
    """The trainer on stored images: reading, crops, step.

    Attributes:
        images_per_second: of windows of ``--steps`` steps, the first of which is left out.
        waiting: share of the time in which the device waited for data; the worst of these windows.
        whole: images per second of the whole sitting, start of the workers and compilation included.
    """

    recipe: str
    images_per_second: Spread
    waiting: float
    whole: float


def run_loop(recipe: Recipe, data: str, steps: int, repeats: int) -> Loop:
    """Train for a moment and read what the trainer says of itself."""
    sets = [
        f"optim.steps={(repeats + 1) * steps}",
        f"watch.log_every={steps}",
        "watch.evaluations=0",
        "watch.checkpoints=1",
        "watch.tensorboard=false",
    ]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        summary = pretrain(make_recipe(recipe.model_dump(mode="json"), sets), data, out)
        lines = read_metrics(out)[1:]
    release(torch.device(recipe.engine.device))
    assert summary.images_per_second is not None  # it began anew
    speeds = Spread.of([line["images_per_second"] for line in lines])
    return Loop(recipe.name, speeds, max(line["waiting"] for line in lines), summary.images_per_second)


def table(comparisons: Sequence[Comparison]) -> str:
    """Median, with the range over the blocks in brackets."""
    lines = [
        "| recipe | code | images/s | share of peak | peak memory | ours : this |",
        "|---|---|---|---|---|---|",
    ]
    for c in comparisons:
        for side, speed in c.speeds.items():
            share = f"{speed.images_per_second.median * c.flops / c.peak:.1%}" if c.peak else "-"
            memory = f"{speed.memory / 2**30:.1f} GiB" if speed.memory else "-"
            beside = c.ratios.get(side, "" if c.ratios else "no official code, no ratio")
            cells = (c.recipe["name"], speed.label, speed.images_per_second, share, memory, beside)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def profile_table(comparisons: Sequence[Comparison], measured: float) -> str:
    """Milliseconds of a step by what its kernels do, the rate at which matrix products and attention ran
    beside that of large products, and before which kernels the device waits longest.
    """
    every = [profile for c in comparisons for profile in c.profiles.values()]
    kinds = sorted({kind for profile in every for kind in profile.kinds})
    lines = [
        f"large bf16 matrix products run at {measured / 1e12:.0f} TFLOP/s here",
        "| " + " | ".join(["recipe", "code", "step, ms", "GPU busy", *kinds, "TFLOP/s in both"]) + " |",
        "|---" * (len(kinds) + 5) + "|",
    ]
    for c in comparisons:
        for profile in c.profiles.values():
            took = [f"{profile.kinds.get(kind, 0.0):.2f}" for kind in kinds]
            rate = (
                c.flops * c.recipe["optim"]["batch_size"] / (profile.counted / 1000) if profile.counted else 0
            )
            busy = f"{profile.busy / profile.step:.0%}"
            cells = [c.recipe["name"], profile.label, f"{profile.step:.1f}", busy, *took]
            lines.append(f"| {' | '.join([*cells, f'{rate / 1e12:.0f}'])} |")
    for c in comparisons:
        for profile in c.profiles.values():
            waits = ", ".join(
                f"{took:.2f} before {name[:60]}" for name, took in list(profile.waits.items())[:3]
            )
            lines.append(f"{c.recipe['name']}, {profile.label}: the device waits {waits} (ms of a step)")
    return "\n".join(lines)


def loop_table(loops: Sequence[Loop]) -> str:
    lines = ["| recipe | whole loop, images/s | waiting for data | with start |", "|---|---|---|---|"]
    lines += [f"| {x.recipe} | {x.images_per_second} | {x.waiting:.1%} | {x.whole:.1f} |" for x in loops]
    return "\n".join(lines)


def circumstances(recipe: Recipe, steps: int, repeats: int) -> dict[str, Any]:
    device = recipe.engine.device
    precision = resolve_precision(recipe.engine, torch.device(device).type)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(device, precision).model_dump(mode="json"),
        "threads": torch.get_num_threads(),
        "batch": recipe.optim.batch_size,
        "steps": steps,
        "repeats": repeats,
        "timm_fused_attention": use_fused_attn(),
    }


def describe(facts: Mapping[str, Any]) -> str:
    found = facts["environment"]
    commit = (found["git_commit"] or "none")[:12] + (" with changes" if found["git_dirty"] else "")
    packages = ", ".join(f"{name} {found['packages'][name]}" for name in ("torch", "timm", "numpy"))
    return (
        f"{facts['date']}, lmim-bench {found['lmim_bench']} at commit {commit}, Python {found['python']}, "
        f"{packages}\n{found['device']}, {found['precision']}, batch "
        f"{facts['batch']}, {facts['repeats']} blocks of {facts['steps']} steps; timm's fused attention "
        f"{'on' if facts['timm_fused_attention'] else 'off'}"
    )


def find_official(name: str, peers: Path | None) -> Official | None:
    """The official code of a recipe, where it is."""
    kind = OFFICIAL[name]
    if peers is None or not kind.lies_in(peers):
        where = "give --peers DIR" if peers is None else f"there is no {kind.folder} in the folder of --peers"
        click.echo(f"{name}: no checkout of {kind.repository} ({where}): ours is measured alone, no ratio")
        return None
    official = kind(peers)
    version = official.version()
    commit = version["commit"] or f"unknown, git blob of the model file {version['model_blob']}"
    click.echo(f"{name}: {kind.repository} at commit {commit}")
    return official


@click.command()
@click.option(
    "--peers",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the official checkouts, mae and LatentMIM.",
)
@click.option("--recipe", type=click.Choice([*OFFICIAL, "all"]), default="all", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps of a block; 20 on a GPU, 2 without.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Blocks of each side."
)
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="SECTION.FIELD=VALUE",
    help="Changes of the recipes, of both sides where both have it: optim.batch_size=128, "
    "engine.precision=fp32, engine.compile=off.",
)
@click.option(
    "--profile", "profiled", is_flag=True, help="Say where a step of each side spends its time; on a GPU."
)
@click.option("--data", help="Images, to measure the whole loop of the trainer as well: what pretrain takes.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Where the numbers go."
)
def main(**options: Any) -> None:
    """Images per second in training, ours against the official code of MAE and Latent MIM."""
    try:
        measure(**options)
    except LmimBenchError as error:
        raise click.ClickException(str(error)) from error


def measure(
    peers: Path | None,
    recipe: str,
    device: str,
    steps: int | None,
    repeats: int,
    sets: Sequence[str],
    profiled: bool,
    data: str | None,
    json_path: Path | None,
) -> None:
    torch.backends.cudnn.benchmark = True  # as both official mains set it
    names = list(OFFICIAL) if recipe == "all" else [recipe]
    device = resolve_device(device)
    kind = "cuda" if device.startswith("cuda") else "cpu"
    steps = steps or STEPS[kind]
    if profiled and kind != "cuda":
        raise click.UsageError("--profile reads what a GPU did, and there is none")
    recipes = {name: load_recipe(name, [*SIZES[kind], *sets, f"engine.device={device}"]) for name in names}
    if any(changed.engine.accumulate > 1 for changed in recipes.values()):
        raise click.UsageError("engine.accumulate is not for this: whole steps are compared")
    facts = circumstances(recipes[names[0]], steps, repeats)
    click.echo(describe(facts))
    if peers:
        click.echo("patched for the official code: " + "; ".join(PATCHES))
    comparisons = []
    for name, changed in recipes.items():
        model, size = changed.model, changed.data.image_size
        click.echo(
            f"{name}: {model.arch}, {model.shape[1]} blocks {model.shape[0]} wide, patch {model.patch_size}, "
            f"image {size}; {describe_cost(changed)}"
        )
        comparisons.append(compare(changed, find_official(name, peers), steps, repeats, profiled))
    click.echo("\n" + table(comparisons))
    loops = [run_loop(changed, data, steps, repeats) for changed in recipes.values()] if data else []
    if loops:
        click.echo("\n" + loop_table(loops))
    measured = product_peak(torch.device(device)) if profiled else None
    if json_path:
        payload = {
            **facts,
            "patches": PATCHES if peers else (),
            "product_peak": measured,
            "comparisons": [asdict(c) for c in comparisons],
            "loops": [asdict(loop) for loop in loops],
        }
        json_path.write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")
    if measured:
        click.echo("\n" + profile_table(comparisons, measured))


if __name__ == "__main__":
    main()
