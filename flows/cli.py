"""The front door: `featherweight`. Heavy libraries are imported by the commands that need them, never by `--help`."""

from __future__ import annotations

import atexit
import errno
import json
import math
import os
import re
import sys
import traceback
from contextvars import ContextVar
from gc import freeze
from pathlib import Path
from typing import Annotated, Any

import typer

from featherweight.errors import FeatherweightError, RecipeError, StageError, one_line
from featherweight.masking import masked
from featherweight.system import mlflow_import
from featherweight.visible import in_lines, visible
from flows.progress_view import view_for
from flows.terminal import at_once, console, spare_surrogates

EXIT_CODES = """Exit codes: 0 done · 1 unexpected failure · 2 recipe or command line · 3 checkpoint · 4 data · 5 stage or parity ·
6 server, store or disk · 7 toolchain missing · 8 refused by a gate, or no variant keeps the constraints · 9 damaged artifact ·
130 stopped by Ctrl-C (the same command resumes)"""

READERS = ("audit", "compare", "history", "impact", "lineage", "plan", "variants")
"""Commands that ask MLflow's client, and nothing else of MLflow."""

app = typer.Typer(
    name="featherweight",
    help="Turns a transformer checkpoint into the lightest variant that still does the job, and promotes it.",
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArg = Annotated[
    str,
    typer.Argument(metavar="RECIPE|CHECKPOINT", help="A recipe (YAML); or a checkpoint, for which one is composed from advice."),
]
TextOpt = Annotated[str | None, typer.Option(help="Without a recipe: a file, folder or s3:// prefix of text.")]
BudgetOpt = Annotated[str, typer.Option(help="Without a recipe: how long it may take, such as 10m.")]
LossOpt = Annotated[str, typer.Option(help="Without a recipe: loss of quality allowed, such as 1%; none for no bound.")]
SetOpt = Annotated[list[str], typer.Option("--set", metavar="KEY.KEY=VALUE", help="Override one key of the recipe; repeatable.")]
WorkspaceOpt = Annotated[
    Path, typer.Option("--workspace", "-w", envvar="FEATHERWEIGHT_WORKSPACE", help="Where runs, artifacts and results live.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
WhyOpt = Annotated[str, typer.Option("--why", help="The reason, kept in the history.")]
PageOpt = Annotated[Path | None, typer.Option("--page", help="Write it as one page that opens offline (lineage.html).")]
SmokeOpt = Annotated[
    bool,
    typer.Option("--smoke/--no-smoke", help="Ask the new champion something on its engine; back to the former if it fails."),
]
ModelArg = Annotated[str, typer.Argument(help="A registered model, such as 'stories', 'stories@champion' or 'stories/3'.")]
HERE = Path(".featherweight")
BEGIN, LOOK, DECIDE, RUN = "Optimize", "Look at what came of it", "Decide", "Serve and keep"
_printed_json: ContextVar[bool] = ContextVar("printed_json", default=False)


@app.command(epilog=EXIT_CODES, rich_help_panel=BEGIN)
def init(
    checkpoint: Annotated[str, typer.Argument(help="What to start from, as in advise; six questions where omitted.")] = "",
    text: Annotated[str | None, typer.Option(help="A file, folder or s3:// prefix of text like what it will read.")] = None,
    use: Annotated[str, typer.Option("--for", help="one (a request at a time), users:N (so many at once) or batch:N.")] = "one",
    machine: Annotated[str, typer.Option(help="Where it is to be served: this, cpu, or GPUs such as L4 or 2xH100.")] = "this",
    max_loss: Annotated[str, typer.Option(help="Loss of quality allowed, such as 1%; none for no bound.")] = "1%",
    budget: Annotated[str, typer.Option(help="How long the optimization may take, such as 10m.")] = "10m",
    out: Annotated[Path, typer.Option(help="The recipe's file.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    workspace: WorkspaceOpt = HERE,
) -> None:
    """Write a recipe with its reasons as comments: asks six questions, or none where the checkpoint is given."""
    at_once(f"looking at {checkpoint or 'this machine'}")
    from flows.composed import Wanted
    from flows.init import answers, asker, next_step, write_recipe

    wanted = Wanted(text, budget, max_loss, use, machine)
    if not checkpoint:
        checkpoint, wanted = answers(asker(), wanted)
    made = write_recipe(checkpoint, wanted, out, workspace, force)
    typer.echo(f"{out}: {len(made.recipe.variants or ())} variants; {next_step(wanted, out)}")


@app.command(epilog=EXIT_CODES, rich_help_panel=BEGIN)
def optimize(
    recipe: RecipeArg,
    overrides: SetOpt = [],  # noqa: B006 - typer wants a plain default
    text: TextOpt = None,
    budget: BudgetOpt = "10m",
    max_loss: LossOpt = "1%",
    workspace: WorkspaceOpt = HERE,
    report: Annotated[Path | None, typer.Option(help="Where to put report.html.")] = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Run the recipe: every variant made, measured on its serving engine, and the winner registered and promoted.

    Stop it at any moment; the same command resumes and recomputes no finished stage. Given a checkpoint, it composes the recipe
    from what `advise` says, writes it to the workspace, and runs it.
    """
    at_once(f"reading {recipe}")
    from flows.composed import Wanted, written
    from flows.launch import launch
    from tasks.summary import require_winner

    path = written(recipe, Wanted(text, budget, max_loss), workspace, quiet)
    result = launch(path, tuple(overrides), workspace, view_for(quiet))
    page = _place_report(result.report, report or Path("report.html"))
    if as_json:
        _print_json(result.to_dict())
    else:
        from featherweight.report.tables import terminal_table

        _console().print(terminal_table(result))
        _console().print(visible(result.headline()), style="bold", highlight=False, markup=False, soft_wrap=True)
        typer.echo(in_lines(filter(None, (*result.note_lines, result.registered, f"report: {page}"))))
    require_winner(result)


@app.command(epilog=EXIT_CODES, rich_help_panel=BEGIN)
def demo(
    overrides: SetOpt = [],  # noqa: B006
    workspace: WorkspaceOpt = HERE,
    report: Annotated[Path | None, typer.Option(help="Where to put report.html.")] = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Run recipes/demo.yaml: train a small Llama on Python's own source, and take it through every stage. Needs no network."""
    from featherweight.system.shipped import shipped

    optimize(str(shipped("recipes/demo.yaml")), overrides, None, "10m", "1%", workspace, report, as_json, quiet)


@app.command(epilog=EXIT_CODES, rich_help_panel=BEGIN)
def plan(
    recipe: RecipeArg,
    overrides: SetOpt = [],  # noqa: B006
    text: TextOpt = None,
    budget: BudgetOpt = "10m",
    max_loss: LossOpt = "1%",
    workspace: WorkspaceOpt = HERE,
    as_json: JsonOpt = False,
) -> None:
    """Show the tree of variants, what they share, what was ruled out and why, and the estimated cost. Runs nothing.

    Given a checkpoint, it is the plan of the recipe that `optimize` would compose.
    """
    at_once(f"reading {recipe}")
    from flows.composed import Wanted, recipe_for
    from flows.plan_view import plan_tree
    from tasks.forecast import forecast

    shown = forecast(recipe_for(recipe, tuple(overrides), Wanted(text, budget, max_loss), workspace, told=not as_json), workspace)
    if as_json:
        _print_json(shown.to_dict())
    else:
        _console().print(plan_tree(shown), highlight=False)


@app.command(epilog=EXIT_CODES, rich_help_panel=BEGIN)
def advise(
    checkpoint: Annotated[
        str, typer.Argument(help="A folder, a GGUF file, an adapter, hf:ORG/NAME, s3://..., models:/NAME@ALIAS.")
    ],
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a request.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens of its answer; of both less where the context is shorter.", min=1)] = 128,
    batch: Annotated[int, typer.Option(help="Requests in one batch.", min=1)] = 1,
    concurrency: Annotated[int | None, typer.Option(help="Requests at a time that come one by one, as from users.", min=1)] = None,
    task: Annotated[str | None, typer.Option(help="What the model is for; its own task where omitted.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    gpus: Annotated[int | None, typer.Option(help="Of another machine: how many GPUs it has.", min=0)] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="Of another machine: GiB of each GPU.")] = None,
    compute_capability: Annotated[str | None, typer.Option(help="Of another machine's GPUs, such as 9.0.")] = None,
    memory: Annotated[float | None, typer.Option(help="Of another machine: GiB of main memory.")] = None,
    max_loss: Annotated[str, typer.Option(help="Of quality, such as 1%; none for no bound.")] = "1%",
    workspace: WorkspaceOpt = HERE,
    as_json: JsonOpt = False,
) -> None:
    """Say which engine and which grid suit a checkpoint, a machine and a workload, with what is to be expected. Runs nothing."""
    at_once(f"looking at {checkpoint}")
    from featherweight.recipe.advice.expected import Asked
    from flows.advise import Described, advice_on, advice_view

    machine = Described(device, gpus, gpu_memory, compute_capability, memory)
    asked = Asked(prompt_tokens, new_tokens, concurrency or batch, concurrency is not None)
    advice = advice_on(checkpoint, machine, asked, max_loss, task, workspace)
    if as_json:
        _print_json(advice.to_dict())
    else:
        _console().print(advice_view(advice), highlight=False)


@app.command(rich_help_panel=LOOK)
def variants(
    run: Annotated[str, typer.Argument(help="An optimization's MLflow run id; the latest where omitted.")] = "",
    workspace: WorkspaceOpt = HERE,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print table and outcome as Markdown, as for a README.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Show the table of a finished optimization."""
    place = _workspace(workspace, "finished optimization")
    from featherweight.report.tables import markdown_table, terminal_table
    from tasks.summary import past_result

    result = past_result(place, run)
    if as_json:
        _print_json(result.to_dict())
    elif markdown:
        typer.echo(f"{markdown_table(result)}\n{visible(result.headline())}")
    else:
        _console().print(terminal_table(result))
        _console().print(visible(result.headline()), highlight=False, markup=False)
        typer.echo(in_lines(result.note_lines), nl=bool(result.note_lines))


@app.command(epilog=EXIT_CODES, rich_help_panel=LOOK)
def lineage(
    model: ModelArg,
    verify: Annotated[bool, typer.Option("--verify", help="Recompute every digest; exit 9 where any is altered or gone.")] = False,
    page: PageOpt = None,
    bom: Annotated[Path | None, typer.Option("--bom", help="Write a CycloneDX bill of materials.")] = None,
    card: Annotated[Path | None, typer.Option("--card", help="Write a model card (Markdown).")] = None,
    openlineage: Annotated[str, typer.Option(metavar="FILE|URL", help="Send its stage runs as OpenLineage events.")] = "",
    licence: Annotated[str, typer.Option("--license", help="Of the model, for the bill and the card: an SPDX identifier.")] = "",
    workspace: WorkspaceOpt = HERE,
    as_json: JsonOpt = False,
) -> None:
    """Show what a registered version is made of: checkpoint, data, recipe, code, machine, every stage and number."""
    place = _registered_in(workspace, model)
    from flows.audit import audit
    from flows.standards import write_standards

    found = audit(place, model, verify, page)
    for line in write_standards(found.lineage, bom, card, openlineage, licence):
        typer.echo(visible(line), err=True)
    _tell(found, as_json)
    found.raise_if_wrong()


@app.command(rich_help_panel=LOOK)
def compare(
    a: ModelArg,
    b: Annotated[str, typer.Argument(help="Another; a bare number, or @ALIAS, is a version of the same model.")],
    workspace: WorkspaceOpt = HERE,
    as_json: JsonOpt = False,
) -> None:
    """Show two registered versions side by side: verified figures, quality window by window, recipes, lineages."""
    place = _registered_in(workspace, a)
    from flows.comparing import compared

    _tell(compared(place, a, b), as_json)


@app.command(epilog=EXIT_CODES, rich_help_panel=LOOK)
def reproduce(
    model: ModelArg,
    into: Annotated[Path | None, typer.Option(help="The new workspace; reproduced/NAME-VERSION where omitted.")] = None,
    workspace: WorkspaceOpt = HERE,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Make a registered version once more from its lineage, in a workspace of its own; exit 9 where a stage makes other bytes."""
    store = _registered_in(workspace, model)
    from flows.reproduce import reproduce as again

    place = into or Path("reproduced") / model.removeprefix("models:/").replace("/", "-").replace("@", "-")
    found = again(store, model, place, view_for(quiet))
    _tell(found, as_json)
    found.raise_if_wrong()


@app.command(epilog=EXIT_CODES, rich_help_panel=LOOK)
def remeasure(
    model: ModelArg,
    text: Annotated[
        str, typer.Option(help="Fresh text: a file, folder or s3:// prefix; its own held-out text where omitted.")
    ] = "",
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Where it may win: optimize by its own recipe once more.")] = False,
    workspace: WorkspaceOpt = HERE,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Measure a registered version again, beside its checkpoint, with the engines of now; exit 8 where it has drifted.

    It has drifted where its quality, its speed on the same machine or a constraint is worse than when it was registered, beyond the
    noise, or where the checkpoint itself predicts the fresh text worse. MLflow keeps each re-measurement.
    """
    place = _registered_in(workspace, model)
    from flows.remeasure import rebuilt
    from flows.remeasure import remeasure as again

    found = again(place, model, text)
    if rebuild and found.rebuild_may_win:
        from flows.launch import launch

        found = rebuilt(place, found, lambda recipe, changes: launch(recipe, tuple(changes), workspace, view_for(quiet)).registered)
    _tell(found, as_json)
    found.raise_if_drifted()


@app.command(rich_help_panel=LOOK)
def impact(
    checkpoint: Annotated[str, typer.Option(metavar="DIGEST|PATH", help="Digest (or its start) or source of a checkpoint.")] = "",
    data: Annotated[str, typer.Option(metavar="DIGEST|PATH", help="The same of a text.")] = "",
    library: Annotated[str, typer.Option(metavar="NAME[==VERSION]", help="A library that shaped a stage's result.")] = "",
    workspace: WorkspaceOpt = HERE,
    as_json: JsonOpt = False,
) -> None:
    """Show which registered versions go back to a checkpoint, a text or a library, those that are deployed first."""
    place = _workspace(workspace, "registered model")
    from flows.impact import depending

    _tell(depending(place, checkpoint, data, library), as_json)


@app.command(rich_help_panel=LOOK)
def history(
    model: ModelArg,
    repair: Annotated[bool, typer.Option("--repair", help="Where its end was cut off: let what is left count.")] = False,
    workspace: WorkspaceOpt = HERE,
    as_json: JsonOpt = False,
) -> None:
    """Show who moved which version where, when and why, with the gates that judged, and what came second."""
    place = _registered_in(workspace, model)
    from flows.history import history_of

    _tell(history_of(place, model, repair), as_json)


@app.command(name="audit", epilog=EXIT_CODES, rich_help_panel=LOOK)
def audit_models(
    model: Annotated[str, typer.Argument(help="A registered model.")] = "",
    every: Annotated[bool, typer.Option("--all", help="All registered models.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="First mend the history; aliases, tags and stages follow it.")] = False,
    page: PageOpt = None,
    workspace: WorkspaceOpt = HERE,
    as_json: JsonOpt = False,
) -> None:
    """Hold everything that is stored of a model against what was signed, decided and measured; exit 9 where anything differs."""
    if bool(model) == every:
        raise RecipeError("audit a model by its name, or --all")
    place = _workspace(workspace, "registered model")
    from flows.audit import audit_registry

    found = audit_registry(place, model, repair, page)
    _tell(found, as_json)
    found.raise_if_wrong()


@app.command(rich_help_panel=DECIDE)
def keys(action: Annotated[str, typer.Argument(help="init: make a key pair that signs from now on.")]) -> None:
    """Make the key pair that signs what is registered and decided here. Others trust its public key as trusted/NAME.pem."""
    from featherweight.registry.keys import Keys

    if action != "init":
        raise RecipeError(f"unknown action '{action}'; known: init")
    typer.echo(f"public key: {Keys.here().make()}")
    typer.echo("what was registered before is not signed: from now on audit tells of it, and serve, deploy and promote refuse it")


@app.command(rich_help_panel=DECIDE)
def promote(
    model: ModelArg,
    to: Annotated[str, typer.Option("--to", help="staging, production, archived or none.")] = "production",
    why: WhyOpt = "promoted by hand",
    force: Annotated[bool, typer.Option("--force", help="Promote although a gate refuses; the history says so.")] = False,
    smoke: SmokeOpt = True,
    workspace: WorkspaceOpt = HERE,
    as_json: JsonOpt = False,
) -> None:
    """Move a version to a stage, if the gate against the present champion lets it pass."""
    place = _registered_in(workspace, model)
    from flows.by_hand import promote_by_hand

    _tell(promote_by_hand(place, model, to, why, force, smoke), as_json)


@app.command(epilog=EXIT_CODES, rich_help_panel=DECIDE)
def approve(
    model: ModelArg,
    why: Annotated[str, typer.Option("--why", help="The reason, kept in the history with your name.")],
    refuse: Annotated[bool, typer.Option("--refuse", help="Refuse it: it goes back to none.")] = False,
    smoke: SmokeOpt = True,
    workspace: WorkspaceOpt = HERE,
    as_json: JsonOpt = False,
) -> None:
    """Approve a version that waits in staging (promote.approval: required): it is promoted through its other gates."""
    place = _registered_in(workspace, model)
    from flows.by_hand import approve_by_hand

    _tell(approve_by_hand(place, model, why, refuse, smoke), as_json)


@app.command(rich_help_panel=DECIDE)
def rollback(
    model: ModelArg, why: WhyOpt = "rolled back by hand", workspace: WorkspaceOpt = HERE, as_json: JsonOpt = False
) -> None:
    """Make the previous champion the champion again."""
    place = _registered_in(workspace, model)
    from flows.by_hand import roll_back_by_hand

    _tell(roll_back_by_hand(place, model, why), as_json)


@app.command(epilog=EXIT_CODES, rich_help_panel=RUN)
def serve(
    model: ModelArg,
    host: Annotated[str, typer.Option(help="Where to listen; set a token where others can reach it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for a free one.", min=0, max=65535)] = 8000,
    every: Annotated[float, typer.Option(help="Seconds between looks at the alias.", min=0.5)] = 5.0,
    workspace: WorkspaceOpt = HERE,
    as_json: Annotated[bool, typer.Option("--json", help="Tell what happens in JSON, a value a line.")] = False,
) -> None:
    """Verify a version and serve it as it was measured, until Ctrl-C; with an alias (champion) follow it, losing no request.

    On the engine's own server where it has one (vLLM's, as OpenAI's), else MLflow's (/invocations). Set
    FEATHERWEIGHT_SERVE_TOKEN to ask for it as a bearer token.
    """
    place = _registered_in(workspace, model)
    from flows.serve import serve as serve_version

    serve_version(place, model, host, port, every, as_json)


@app.command(epilog=EXIT_CODES, rich_help_panel=RUN)
def guard(
    host: Annotated[str, typer.Option(help="Where to listen for MLflow's webhooks.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for a free one.", min=0, max=65535)] = 8100,
    url: Annotated[str, typer.Option(help="Where MLflow reaches this, if not at that host and port.")] = "",
    every: Annotated[float, typer.Option(help="Seconds between looks at all models.", min=1)] = 30.0,
    workspace: WorkspaceOpt = HERE,
    as_json: Annotated[bool, typer.Option("--json", help="Tell what happens in JSON, a value a line.")] = False,
) -> None:
    """Hold aliases and stages in MLflow to the histories until Ctrl-C: what others move is judged, recorded, undone or kept.

    Within seconds where the MLflow server sends webhooks, which it is asked for here, else at the next look.
    """
    place = _workspace(workspace, "registered model")
    from flows.guard import guard as guard_registry

    guard_registry(place, host, port, url, every, as_json)


@app.command(epilog=EXIT_CODES, rich_help_panel=BEGIN)
def watch(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of checkpoints, s3://bucket/prefix, hf:org/name (its revisions) or models:/NAME (its versions)."
        ),
    ] = "",
    recipe: Annotated[Path | None, typer.Option("--recipe", "-r", help="The recipe for each new checkpoint.")] = None,
    every: Annotated[float, typer.Option(help="Seconds between looks.", min=1)] = 60.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, optimize what is due, and end.")] = False,
    status: Annotated[
        bool,
        typer.Option(
            "--status", help="Tell how all arrivals stand, the quarantined with the reason; with SOURCE also those that wait."
        ),
    ] = False,
    take: Annotated[str, typer.Option(help="Of a training run's checkpoints: every, every:N, best or best:METRIC.")] = "every",
    settle: Annotated[float, typer.Option(help="Seconds for which a new checkpoint must not have changed.")] = 10.0,
    tries: Annotated[
        int, typer.Option(help="Tries of an optimization that fails, before it is quarantined; more let it out again.", min=1)
    ] = 3,
    overrides: SetOpt = [],  # noqa: B006
    workspace: WorkspaceOpt = HERE,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Optimize every complete new checkpoint at SOURCE, once each by its content, however many watch and whoever is killed."""
    at_once(f"looking at {source or workspace}")
    from flows.watch_schedule import arrivals_status, look_once, parameters_of, serve_watch
    from tasks.claims import Patience

    patience = Patience(tries=tries)
    if status:
        _tell_arrivals(arrivals_status(workspace, patience, source, take, settle), as_json)
        return
    if not source or recipe is None:
        raise RecipeError("featherweight watch wants a SOURCE and --recipe, or --status")
    parameters = parameters_of(source, recipe, tuple(overrides), workspace, take, settle, patience)
    if not once:
        serve_watch(parameters, workspace, every, view_for(quiet))
        return
    seen = look_once(parameters, workspace, view_for(quiet))
    _tell_arrivals(seen, as_json)
    failed = [one for one in seen if one["status"] == "failed"]
    if failed:
        raise StageError(f"{len(failed)} of {len(seen)} arrivals failed, first {failed[0]['source']}: {failed[0]['error']}")


@app.command(epilog=EXIT_CODES, rich_help_panel=RUN)
def deploy(
    model: ModelArg,
    to: Annotated[str, typer.Option("--to", help="folder (with a start script), compose, kserve, vllm (Kubernetes) or oci.")],
    out: Annotated[Path | None, typer.Option(help="The new folder; deployed/NAME[-VERSION] where omitted.")] = None,
    image: Annotated[str, typer.Option(help="What a container runs; vLLM's own, or 'featherweight' (infra/Dockerfile).")] = "",
    storage: Annotated[str, typer.Option(help="Where a cluster finds the folder: pvc://CLAIM/PATH, s3://... or oci://...")] = "",
    workspace: WorkspaceOpt = HERE,
    as_json: JsonOpt = False,
) -> None:
    """Write a verified version as a platform takes it, with its measured settings; its files are checked again as it starts."""
    store = _registered_in(workspace, model)
    from flows.deploy import deploy as write

    place = out or Path("deployed") / model.removeprefix("models:/").replace("/", "-").replace("@", "-")
    _tell(write(store, model, to, place, image, storage), as_json)


@app.command(epilog=EXIT_CODES, rich_help_panel=RUN)
def gc(
    older: Annotated[str, typer.Option(help="What is younger stays, such as 30d.")] = "30d",
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without, it is only told.")] = False,
    workspace: WorkspaceOpt = HERE,
    as_json: JsonOpt = False,
) -> None:
    """Tell what of the store may go, and what comes free: never what is deployed, decided about, in use, or a parent of those."""
    place = _workspace(workspace, "store")
    from featherweight.registry.retention import collect
    from featherweight.spec import seconds_of
    from featherweight.system.user import user_name

    _tell(collect(place, seconds_of(older, "--older"), user_name(), remove=yes), as_json)


@app.command(epilog=EXIT_CODES, rich_help_panel=RUN)
def mcp(workspace: WorkspaceOpt = HERE) -> None:
    """Serve plan, variants, lineage and audit over standard input and output as an MCP server (extra `mcp`); it changes nothing."""
    from flows.mcp_server import serve as serve_tools

    serve_tools(workspace)


@app.command(rich_help_panel=RUN)
def doctor(
    as_json: JsonOpt = False,
    install: Annotated[str, typer.Option(metavar="NAME", help="Install this toolchain, and look at nothing.")] = "",
) -> None:
    """Say what this machine has, which toolchains are ready, what is missing and how to get it."""
    at_once("looking at this machine" if not install else f"installing {install}")
    from featherweight.runtimes.doctor import diagnose, install_toolchain, render

    if install:
        install_toolchain(install)
        return
    found = diagnose()
    if as_json:
        _print_json(found.to_dict())
    else:
        _console().print(render(found), highlight=False)
    if found.exit_code:
        raise typer.Exit(found.exit_code)


@app.command(rich_help_panel=RUN)
def ui(
    workspace: WorkspaceOpt = HERE,
    port: Annotated[int, typer.Option(help="Port of the page; another where it is taken.", min=0, max=65535)] = 4100,
    prefect_port: Annotated[int, typer.Option(help="Port of the Prefect server.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow server.")] = 5000,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    servers: Annotated[bool, typer.Option("--servers/--no-servers", help="Start Prefect's and MLflow's own pages too.")] = True,
) -> None:
    """Serve a page over all models and runs until Ctrl-C: reports, lineage, audits; promote, approve, roll back.

    It listens on this machine and wants the token of the address that is printed. Beside it are Prefect's and MLflow's own pages.
    """
    from flows.ui import serve_ui

    serve_ui(_workspace(workspace), port, prefect_port, mlflow_port, browser, servers)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole trace of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    if version:
        from featherweight import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        from flows.next_step import look, told

        typer.echo(visible(told(look(Path(), Path(os.environ.get("FEATHERWEIGHT_WORKSPACE") or HERE))), kept="\n"))


def main() -> None:
    """The program: a command line that has its process to itself."""
    spare_surrogates()
    atexit.register(freeze)  # else the interpreter takes most of a second to look through all that is about to go
    if next((word for word in sys.argv[1:] if not word.startswith("-")), "") in READERS:
        mlflow_import.for_reading()
    run()


def run() -> None:
    """Run the command line; every refusal is one line on standard error and an exit code of its own."""
    try:
        app()
    except FeatherweightError as error:
        _fail(error, one_line(error, 2000), error.exit_code)
    except SystemExit as end:
        if end.code:
            _json_of_failure("the command line was refused; standard error says why", end.code)
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = f" for {error.filename}" if error.filename else ""
            _fail(error, f"{error.strerror}{place}; make room, and the same command goes on where it was", 6)
        text = one_line(error, 300)
        _fail(error, f"unexpected {type(error).__name__}: {text} (--debug shows the trace)", 1)


def _fail(error: Exception, line: str, code: int) -> None:
    trace = "".join(traceback.format_exception(error)) if "--debug" in sys.argv else ""
    print(visible(masked(trace), kept="\n") + f"featherweight: {line}", file=sys.stderr)
    _json_of_failure(line, code)
    sys.exit(code)


def _json_of_failure(line: str, code: object) -> None:
    """Where JSON was asked for and none was printed yet, what went wrong is the JSON."""
    if "--json" in sys.argv and not _printed_json.get():
        _print_json({"error": line, "exit_code": code})


def _workspace(root: Path, sought: str = "") -> Any:
    """The workspace in `root`, its environment configured before MLflow or Prefect is imported.

    Raises GateError where something is sought as `require_used`.
    """
    server = os.environ.get("MLFLOW_TRACKING_URI")
    at_once(f"asking {masked(server)}" if server else f"reading {root}")
    from featherweight.store.workspace import Workspace, require_used
    from featherweight.system.environment import configure

    if sought:
        require_used(root, sought)
    configure(root)
    return Workspace.at(root)


def _registered_in(root: Path, model: str) -> Any:
    """The workspace in `root` that a registered model is looked for in. Raises GateError as `_workspace`."""
    return _workspace(root, f"registered model '{re.split('[/@]', model.removeprefix('models:/'))[0]}'")


def _place_report(source: Path | None, wanted: Path) -> str:
    """Copy the report to where the user looks for it."""
    if source is None:
        return "none"
    wanted.parent.mkdir(parents=True, exist_ok=True)
    wanted.write_bytes(source.read_bytes())
    return str(wanted)


def _console() -> Any:
    return console(width=None if sys.stdout.isatty() else 200)


def _print_json(value: Any) -> None:
    print(json.dumps(_finite(value), indent=2, default=str, allow_nan=False))
    _printed_json.set(True)


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: null stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _tell_arrivals(arrivals: list[dict[str, Any]], as_json: bool) -> None:
    """Print how arrivals stand, a line each."""
    if as_json:
        _print_json(arrivals)
        return
    if not arrivals:
        typer.echo("no checkpoint has arrived")
    for one in arrivals:
        told = one.get("error") or one.get("winner") or one.get("reason") or ""
        typer.echo(visible(f"{one['status']:12} {one['source']}{f'  ({told})' if told else ''}"))


def _tell(outcome: Any, as_json: bool) -> None:
    """Print what a command did, or found."""
    if as_json:
        _print_json(outcome.to_dict())
    else:
        typer.echo(outcome.to_text())


if __name__ == "__main__":
    main()
