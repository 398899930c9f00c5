"""The commands about checkpoints: ``inspect``, ``formats``, ``doctor``, ``selftest``."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .options import (
    EXIT_FAILED,
    FOLDER,
    cache_option,
    command_line,
    debugging,
    device_option,
    json_option,
    suite_option,
    task_names,
    tasks_option,
)

_SHOWN = 6
# Of the architecture, what `inspect` prints on lines of their own, and what only --json has room for.
_HAVE_LINES = (
    *("builder", "embed_dim", "depth", "num_heads", "patch_size", "image_size"),
    *("class_token", "reg_tokens", "registers"),
    *("config", "pooler", "probed_at"),
)
_CKPT = "[LABEL=]REF"

_REFERENCES = (
    ("FILE", "a checkpoint of one of these layouts: .pth, .pt, .ckpt, .bin, .safetensors"),
    ("FILE#student,heads=6", "the same with choices that it leaves open: an encoder, heads, arch, family"),
    (
        "DIR, hf:DIR",
        "a folder of Hugging Face (any image model), of timm, of torch's distributed checkpoints",
    ),
    ("timm:NAME", "an architecture of timm with seeded random weights"),
    ("timm:NAME:pretrained", "the same with timm's own weights"),
    ("random:REF", "the architecture and preprocessing of REF with seeded random weights"),
    ("python:package.module:factory", "what your factory returns"),
    ("pixels, pixels:PATCH", "no network: pooled pixels"),
)


@click.command()
@click.argument("reference")
@json_option
def inspect(reference: str, as_json: bool) -> None:
    """Say what a checkpoint is: format, architecture, coverage, preprocessing, what was dropped and why."""
    from .encoders import inspect_checkpoint
    from .show import print_sections

    found = inspect_checkpoint(reference)
    registers = found["architecture"].get("registers", found["tokens"]["registers"])
    found = {**found, "registers": registers, "heads": _heads(found)}
    if as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        print_sections(_sections(found))


def _heads(found: Mapping[str, Any]) -> dict[str, Any]:
    """The number of attention heads and the note on where it comes from; None where that is not known."""
    arch = found["architecture"]
    number = arch.get("num_heads", arch.get("kwargs", {}).get("num_heads"))
    source = next((note for note in found["notes"] if re.match(r"(WARNING: )?\d+ heads\b", note)), None)
    return {"number": number, "source": source}


def _sections(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    arch, tokens, preprocessing = found["architecture"], found["tokens"], found["preprocessing"]
    coverage, heads = found["coverage"], found["heads"]
    prefix = ["class token"] if tokens["class"] else []
    prefix += [f"{found['registers']} registers"] if found["registers"] else []
    described = {key: value for key, value in arch.items() if key not in _HAVE_LINES and value != {}}
    filled = f"{coverage['loaded_tensors']} of {coverage['encoder_tensors']} tensors of the encoder"
    return {
        "checkpoint": {
            "source": found["source"],
            "format": found["format"],
            "taken from": found["container"],
            "sha256": found["sha256"],
            "fingerprint": found["fingerprint"],
        },
        "encoder": {
            "family": found["family"],
            "built as": arch.get("builder"),
            "with": ", ".join(f"{key} {_short(value)}" for key, value in described.items()),
            "parameters": f"{found['parameters']:,}",
            "arithmetic": f"{found['flops'] / 1e9:.3g} GFLOP an image" if found["flops"] else "not counted",
            "width": found["embed_dim"],
            "depth": found["depth"],
            "heads": heads["source"] or heads["number"],
            "patch size": found["patch_size"],
            "image size": found["image_size"],
            "tokens": " + ".join([*prefix, f"{tokens['patches']} patches"]),
        },
        "evaluated with": {
            "pooling": found["pooling"],
            "final norm": "yes" if found["final_norm"] else "no",
            "mean": ", ".join(map(str, preprocessing["mean"])),
            "std": ", ".join(map(str, preprocessing["std"])),
            "resize": f"{preprocessing['interpolation']}, crop {preprocessing['crop_pct']} of the short side",
            "positions": f"resampled by the rule {preprocessing['pos_interpolation']!r}",
        },
        "coverage": {
            "filled": f"{filled}{': random weights' if coverage['random_weights'] else ''}",
            "dropped": _by_reason(found["dropped"]),
        },
        "notes": {str(i): note for i, note in enumerate(found["notes"], 1)},
    }


def _by_reason(dropped: Mapping[str, str]) -> list[str]:
    """A line a reason: what was dropped for it."""
    groups: dict[str, list[str]] = {}
    for name, reason in dropped.items():
        groups.setdefault(reason, []).append(name)
    return [
        f"{reason}: {', '.join(names[:_SHOWN])}"
        + (f" and {len(names) - _SHOWN} more (--json)" if len(names) > _SHOWN else "")
        for reason, names in groups.items()
    ]


def _short(value: Any) -> str:
    return json.dumps(value).replace('"', "") if isinstance(value, dict | list) else str(value)


@click.command()
@json_option
def formats(as_json: bool) -> None:
    """List the layouts of checkpoints that are read, and the other things that --ckpt takes."""
    from .checkpoints.loading import families
    from .checkpoints.native import FORMAT
    from .show import print_records

    rows = [
        {
            "family": FORMAT,
            "what": "this project's own format",
            "known_by": f"format: {FORMAT} in the file",
            "encoders": [],
            "evaluated": "as the file says",
            "source": "lmim-bench pretrain",
        }
    ]
    rows += [
        {
            "family": family.name,
            "what": family.title,
            "known_by": family.known_by,
            "encoders": list(family.prefer),
            "evaluated": family.evaluated,
            "source": family.source,
        }
        for family in sorted(families(), key=lambda family: family.name)
    ]
    references = [{"reference": name, "what": what} for name, what in _REFERENCES]
    if as_json:
        listing = {"families": rows, "references": references}
        click.echo(json.dumps(listing, indent=1, ensure_ascii=False))
        return
    print_records(
        ("family", "what", "known by", "default encoder", "evaluated as", "from"),
        [
            (
                row["family"],
                row["what"],
                row["known_by"] or "-",
                row["encoders"][0] if row["encoders"] else "the only one",
                row["evaluated"] or "-",
                row["source"] or "-",
            )
            for row in rows
        ],
    )
    print_records(("--ckpt", "what"), _REFERENCES)


@click.command()
@click.option(
    "--ckpt", "-c", "ckpts", multiple=True, required=True, metavar=_CKPT, help="As run takes it; repeats."
)
@tasks_option
@click.option("--data", "-d", multiple=True, help="Data folder or torchvision:NAME; repeats.")
@suite_option
@click.option("--out", "-o", type=FOLDER, help="Run folder, as of run. [default: runs/<labels>]")
@device_option
@cache_option
@json_option
@click.pass_context
def doctor(
    ctx: click.Context,
    /,
    ckpts: tuple[str, ...],
    tasks: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Check before a run that it would go through: versions, device, disk, data, tasks, checkpoints.

    Every line is pass, warn or fail, and says how to mend it. Exit code 0: nothing fails; 1: something does;
    2: wrong usage.
    """
    from .api import make_config
    from .doctor import examine
    from .progress import Reporter
    from .show import print_checks

    options = {name: value for name, value in options.items() if value not in (None, ())}
    config = make_config(list(ckpts), tasks=task_names(tasks), **options)
    checks = examine(config, Reporter(), debugging(ctx))
    if as_json:
        click.echo(json.dumps([check.model_dump() for check in checks], indent=1, ensure_ascii=False))
    else:
        print_checks(checks)
    if any(check.status == "fail" for check in checks):
        sys.exit(EXIT_FAILED)


@click.command()
@click.option("--ckpt", "-c", "ckpt", required=True, metavar=_CKPT, help="As run takes it.")
@click.option("--out", "-o", type=FOLDER, help="Keep the run folder with its report here.")
@click.pass_context
def selftest(ctx: click.Context, ckpt: str, out: Path | None) -> None:
    """Try a checkpoint in a minute: all tasks, small, on embedded scenes, beside random weights.

    Exit code 0: every cell was scored; 1: some cell failed; 2: wrong input.
    """
    from rich.console import Console

    from ..reports.text import print_summary
    from .config import CheckpointConfig
    from .progress import Reporter
    from .selftest import is_above, self_test

    checkpoint = CheckpointConfig.parse(ckpt)
    debug = debugging(ctx)
    with tempfile.TemporaryDirectory(prefix="lmim-bench-selftest-") as folder:
        working = Path(folder)
        kept = out or working / "run"
        found = self_test(checkpoint, kept, working, Reporter(), command_line(), debug)
        print_summary(found.run, kept, Console())
    for note in found.notes:
        click.echo(f"note       {note}")
    for verdict in found.verdicts:
        click.echo(f"{verdict.column.task:<10} {verdict.sentence}")
    if found.verdicts:
        above = [verdict.column.task for verdict in found.verdicts if is_above(verdict)]
        named = f": {', '.join(above)}" if above else ""
        click.echo(f"verdict    above random weights on {len(above)} of {len(found.verdicts)} tasks{named}")
    scored = "every cell was scored" if not found.failed else f"{found.failed} cells FAILED"
    click.echo(f"{scored} in {found.seconds:.0f} s; a self test on generated pictures: no benchmark numbers")
    if out:
        click.echo(f"report     {out / 'report.html'}")
    if found.failed:
        sys.exit(EXIT_FAILED)
