"""The command line: verbs with `key=value`, one grammar for shell and YAML.

Results go to stdout, progress and logs to stderr. Exit codes: 0 done, 1 the work failed, 2 bad
input or usage, 130 interrupted and resumable.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from deltaloom.cli import OFTEN, look
from deltaloom.cli.arguments import nest, parse_pairs
from deltaloom.cli.mergekit import mergekit
from deltaloom.cli.show import emit, fail
from deltaloom.core.errors import InputError, WorkError

app = typer.Typer(
    name="deltaloom",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Efficient post-training of language models: select data, tune, merge, give another "
    "tokenizer, search settings, measure.\n\n"
    "Every method takes key=value settings, the same keys as in a recipe: "
    "deltaloom tune lora base=MODEL data=rows.jsonl lr=1e-4 out=DIR. "
    "`deltaloom ls` lists the methods, `deltaloom show METHOD` explains one.",
)

Pairs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Inputs and settings; `deltaloom show METHOD` lists these."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
MethodName = Annotated[str, typer.Argument(metavar="METHOD", help="A name from `deltaloom ls`.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")]

RAW = {"ignore_unknown_options": True, "allow_interspersed_args": False}
"""For commands that read their words themselves."""


@app.command()
def select(method: MethodName, settings: Pairs = None, json: Json = False) -> None:
    """Choose rows of a pool: pool=, target=, base=, fraction= or count=, out=."""
    _one_step("select", method, settings, json)


@app.command()
def tune(method: MethodName, settings: Pairs = None, json: Json = False) -> None:
    """Tune a base on rows: base=, data=, evaluate=, out=."""
    _one_step("tune", method, settings, json)


@app.command()
def merge(method: MethodName, settings: Pairs = None, json: Json = False) -> None:
    """Merge deltas of one base: base=, deltas=[A,B], out=."""
    # Mergers have threads of their own; BLAS's take CPU time to start and to wait.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _one_step("merge", method, settings, json)


@app.command()
def transfer(method: MethodName, settings: Pairs = None, json: Json = False) -> None:
    """Give a base another tokenizer: base=, tokenizer=, donor=, data=, out=."""
    _one_step("transfer", method, settings, json)


@app.command()
def search(method: MethodName, settings: Pairs = None, json: Json = False) -> None:
    """Search for settings: base=, data=, evaluate=, out=."""
    _one_step("search", method, settings, json)


@app.command()
def measure(method: MethodName, settings: Pairs = None, json: Json = False) -> None:
    """Measure a base or deltas of it: base=, deltas=[A,B], tasks=[T], compare=, out=."""
    _one_step("measure", method, settings, json)


@app.command()
def run(recipe: RecipeFile, settings: Pairs = None, json: Json = False) -> None:
    """Run a recipe, resuming where it stopped: STEP.KEY=VALUE changes it, out= places it."""
    from deltaloom.recipe.execute import run_recipe
    from deltaloom.recipe.parsing import parse_recipe, read_yaml

    _collect_often()
    pairs = parse_pairs(settings)
    out = Path(str(pairs.pop("out", Path("runs") / recipe.stem)))
    checked = parse_recipe(read_yaml(recipe), str(recipe), pairs)
    emit(out, run_recipe(checked, out), json)


@app.command()
def plan(recipe: RecipeFile, settings: Pairs = None, json: Json = False) -> None:
    """What a recipe will take: time, memory, disk; loads no weights. Checks what merges read."""
    from deltaloom.cli.show import plan_table
    from deltaloom.recipe.parsing import parse_recipe, read_yaml
    from deltaloom.recipe.plan import plan_recipe

    checked = parse_recipe(read_yaml(recipe), str(recipe), parse_pairs(settings))
    lines = plan_recipe(checked)
    plan_table(lines, json)
    problems = [text for one in lines for text in one.get("merging", {}).get("problems", ())]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}")


@app.command()
def quickstart(settings: Pairs = None, json: Json = False) -> None:
    """The whole loop on the embedded lab: select, tune, merge, measure, report. out=, seed=."""
    from deltaloom.cli.quickstart import quickstart as start

    _collect_often()
    pairs = parse_pairs(settings)
    out = Path(str(pairs.pop("out", "deltaloom-quickstart")))
    seed = pairs.pop("seed", 0)
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"seed = {seed!r}: must be a whole number from 0 to {2**32 - 1}")
    record = start(out, seed, pairs)
    emit(out, record, json)
    print(f"report: {out / 'report.html'}", file=sys.stderr)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML file about some runs."""
    from deltaloom.report.page import write_report

    write_report(runs, out)
    print(out)


@app.command()
def serve(
    settings: Pairs = None,
    export: Annotated[
        str | None, typer.Option(help="vllm or transformers: write its launch file, out=.")
    ] = None,
) -> None:
    """Many tasks behind one base, OpenAI's interface: base=, deltas=, router=, host=, port=."""
    from deltaloom.cli.serve import launch_file
    from deltaloom.cli.serve import serve as start

    pairs = nest(parse_pairs(settings))
    if export is not None:
        launch_file(export, pairs)
        return
    _collect_often()
    start(pairs)


app.command("ls")(look.ls)
app.command("show")(look.show)
app.command("schema")(look.schema)
app.command("env")(look.env)
app.command("compare")(look.compare)
app.command("check")(look.check)
app.command("mergekit", add_help_option=False, context_settings=RAW)(mergekit)


def _collect_often() -> None:
    """Before work that may leave large tensors in cycles."""
    gc.set_threshold(*OFTEN)


def _one_step(verb: str, method: str, settings: list[str] | None, json: bool) -> None:
    from deltaloom.recipe.execute import run_step
    from deltaloom.recipe.parsing import parse_step

    pairs: dict[str, Any] = {"method": method, **nest(parse_pairs(settings))}
    out = pairs.pop("out", None)
    planned = parse_step(verb, pairs, f"{verb} {method}")
    folder = Path(str(out)) if out is not None else Path("runs") / planned.step.name
    if verb != "merge" or "data" in planned.method.needs | planned.method.uses:
        _collect_often()
    emit(folder, run_step(planned, folder), json)


def main() -> None:
    """Entry point: errors become one sentence and an exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    _quiet()
    try:
        # Typer turns an interruption into the exit code 130, which it returns.
        code = app(standalone_mode=False)
        if code == 130:
            raise KeyboardInterrupt
        sys.exit(code or 0)
    except (InputError, WorkError) as error:
        sys.exit(fail(str(error), error.exit_code))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(fail("interrupted; the same command takes it up again", 130))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # Everything is written under another name first, so what was there is still whole.
        sys.exit(fail(f"the disk is full ({error}); free some and repeat the command", 1))
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        # A usage error of the command line itself: it carries its own sentence.
        error.show()  # pyright: ignore[reportAttributeAccessIssue]
        sys.exit(code)


def _quiet() -> None:
    """Silence other libraries' bars and advice on stderr, unless the user asked for them."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(transformers|peft|torch|accelerate)\.")


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
