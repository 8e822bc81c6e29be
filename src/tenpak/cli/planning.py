"""Verbs for the steps between statistics and artifact: profile, allocate, encode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenpak.cli.application import app, quiet
from tenpak.cli.console import print_json, print_result, print_table, progress_bar
from tenpak.cli.making import make_artifact
from tenpak.cli.options import (
    AllowOverlap,
    Bpw,
    CandidateList,
    Evaluation,
    Json,
    MaxBytes,
    MaxKl,
    MaxPpl,
    Model,
    Overrides,
    Propagation,
    Remote,
    Revision,
    StatisticsOf,
    Strict,
    Target,
    Text,
    Tokens,
    Tune,
    Window,
    WorkFolder,
)

__all__ = ["allocate", "encode", "profile"]


@app.command()
def profile(
    model: Model,
    out_file: Annotated[Path, typer.Option("-o", "--out", help="file to write")],
    candidates: CandidateList = None,
    overrides: Overrides = None,
    calibration: Text = None,
    calibration_tokens: Tokens = 131_072,
    window: Window = None,
    statistics: StatisticsOf = None,
    measure: Annotated[
        int, typer.Option(min=0, help="also measure so many predictions, of the costliest tensors, each alone")
    ] = 0,
    work: WorkFolder = None,
    seed: Annotated[int, typer.Option(help="of the labels drawn for the curvature")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file at -o")] = False,
    revision: Revision = None,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Try candidates on every tensor of MODEL: bytes, and predicted loss in nats per token."""
    from tenpak.profiling import DEFAULT_CANDIDATES
    from tenpak.profiling import profile as run
    from tenpak.report.planning_rows import measured_rows, profile_rows

    quiet()
    with progress_bar("weights") as update:
        found = run(
            model,
            out_file,
            candidates=tuple(candidates or (DEFAULT_CANDIDATES,)),
            overrides=tuple(overrides or ()),
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            calibration_window=window,
            statistics=statistics,
            measure=measure,
            work=work,
            seed=seed,
            overwrite=overwrite,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=update,
        )
    if as_json:
        print_json(found.model_dump(mode="json", exclude_none=True))
        return
    header, *rows = profile_rows(found)
    print_table(header, rows, str(out_file))
    if found.measured:
        header, *rows = measured_rows(found)
        print_table(header, rows, "predicted and measured, each tensor alone")


@app.command()
def allocate(
    profile_file: Annotated[Path, typer.Argument(metavar="PROFILE", help="file that `tenpak profile` wrote")],
    out_file: Annotated[Path, typer.Option("-o", "--out", help="file to write")],
    target: Target = None,
    bpw: Bpw = None,
    max_bytes: MaxBytes = None,
    max_kl: MaxKl = None,
    max_ppl_increase: MaxPpl = None,
    pins: Annotated[
        list[str] | None, typer.Option("--pin", metavar="PATTERN=RECIPE", help="nothing else for matching tensors")
    ] = None,
    bans: Annotated[
        list[str] | None, typer.Option("--ban", metavar="PATTERN=RECIPE", help="not this for matching tensors")
    ] = None,
    least: Annotated[
        list[str] | None,
        typer.Option("--at-least", metavar="PATTERN=BITS", help="never below so many bits per weight"),
    ] = None,
    fused: Annotated[
        bool, typer.Option("--fused", help="one recipe for Q, K and V of a block, one for gate and up")
    ] = False,
    as_json: Json = False,
) -> None:
    """Choose among the candidates of a profile within a budget; quality counts as predicted."""
    from tenpak.allocation.allocate import allocate as run
    from tenpak.allocation.budget import Budget, one_budget
    from tenpak.allocation.profile import Profile
    from tenpak.errors import BudgetError
    from tenpak.plans import rules_of
    from tenpak.report.planning_rows import plan_rows

    budget = one_budget(target=target, bpw=bpw, bytes=max_bytes, kl=max_kl, ppl=max_ppl_increase)
    if budget is None:
        raise BudgetError("there is no budget", hint="give one of --target, --bpw, --max-bytes, --max-kl")
    rules = rules_of(pins or (), bans or (), least or (), fused=fused)
    found = Profile.read(profile_file)
    plan = run(found, Budget.parse(budget), rules)
    plan.write(out_file)
    print_result(
        plan.model_dump(mode="json", exclude_none=True),
        as_json,
        plan_rows(plan, found.source.parameters),
        str(out_file),
    )


@app.command()
def encode(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder to write")],
    plan: Annotated[Path, typer.Option(help="file that `tenpak allocate` wrote, as it is or edited")],
    overrides: Overrides = None,
    calibration: Text = None,
    calibration_tokens: Tokens = 131_072,
    window: Window = None,
    statistics: StatisticsOf = None,
    propagation: Propagation = "original",
    tune: Tune = None,
    work: WorkFolder = None,
    evaluation: Evaluation = None,
    allow_overlap: AllowOverlap = False,
    strict: Strict = False,
    seed: Annotated[int, typer.Option(help="for codecs that draw random numbers")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the artifact at -o")] = False,
    revision: Revision = None,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Compress MODEL by a plan and, given a text, measure what that cost."""
    quiet()
    options = {
        "plan": plan,
        "overrides": tuple(overrides or ()),
        "calibration": calibration,
        "calibration_tokens": calibration_tokens,
        "calibration_window": window,
        "statistics": statistics,
        "propagation": propagation,
        "tuning": tune,
        "work": work,
        "allow_overlap": allow_overlap,
        "seed": seed,
        "overwrite": overwrite,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    make_artifact(model, out, evaluation, options, strict=strict, as_json=as_json)
