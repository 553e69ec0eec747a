"""The `ipt` command: tokenize, plan, show, train, compile, import, export, eval, ablate, report.

Each command checks its settings, runs one stage and prints the stage's figures. Stages are imported when their command
runs, so that `ipt plan` starts without jax.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ipt_jax.core.cli_support import Result, Shown, command, run_app, show

if TYPE_CHECKING:
    from ipt_jax.ablate.run import AblateSettings
    from ipt_jax.config import Recipe
    from ipt_jax.data.tokenize import TokenizeSettings

STOPPED = 143  # 128 + SIGTERM, as a shell reports it: saved but unfinished, so that a scheduler restarts it
RECIPE = "ipt_jax.config:Recipe"

app = typer.Typer(
    name="ipt",
    help="Pre-train language models on instruction-augmented text.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


def main() -> None:
    run_app(app)


@command(app, recipe="ipt_jax.data.tokenize:TokenizeSettings")
def tokenize(settings: "TokenizeSettings") -> Result:
    """Tokenize text into token shards.

    Reads documents of `synth`, JSON Lines, JSON, CSV, text files, Parquet, Arrow, TFDS and Hugging Face data sets.
    Writes the shards and a manifest to `output`. Rerun the same command to resume; existing shards are verified by
    checksum and damaged ones are rewritten.
    """
    from ipt_jax.data.tokenize import run_tokenize

    return run_tokenize(settings)


@command(app, recipe=RECIPE)
def plan(recipe: "Recipe") -> Result:
    """Compute the token mix of a training recipe.

    Prints documents, tokens, epochs and rows per source, and the number of steps. Exits with code 2 if the amounts
    cannot be met. Reads token shards only. Writes no output.
    """
    from ipt_jax.config import check_schedule
    from ipt_jax.data.plan import plan_warnings, print_plan
    from ipt_jax.train.segments import plan_of_run

    solved, trained = plan_of_run(recipe)
    check_schedule(recipe, solved.steps)
    summary = solved.summary(trained)
    for line in plan_warnings(summary):
        print(f"ipt plan: {line}", file=sys.stderr)
    return Shown(summary, view=lambda: print_plan(summary))


@command(app, "show", recipe=RECIPE)
def show_rows(
    recipe: "Recipe",
    rows: Annotated[int, typer.Option(help="Number of rows to show.", min=1)] = 4,
    step: Annotated[int, typer.Option(help="Training step, from 0, whose rows are shown first.", min=0)] = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="HTML file to write. Default: print to the terminal.")
    ] = None,
) -> Result:
    """Show decoded rows of a training recipe.

    Colours mark the kind of each passage and which tokens the loss counts. Prints to the terminal, or writes an HTML
    page with --output. A rerun overwrites the page.
    """
    from ipt_jax.report.viewer import run_show
    from ipt_jax.train.segments import plan_of_run

    return Shown(*run_show(plan_of_run(recipe)[0], output, step=step, rows=rows))


@command(app, recipe=RECIPE)
def train(
    recipe: "Recipe",
    change: Annotated[
        bool,
        typer.Option("--change", help="Let settings that differ from the checkpoint's hold from it on. Default: off."),
    ] = False,
) -> Result:
    """Train a model.

    Writes checkpoints, metrics.jsonl and run.json to `run_dir`. Rerun the same command to resume from the latest
    checkpoint. SIGTERM, SIGINT, SIGHUP and SIGUSR1 save a checkpoint and exit with code 143.
    """
    from ipt_jax.train.trainer import run_train

    result = run_train(recipe, change=change)
    return Shown(result, exit_code=STOPPED if result["step"] < result["steps"] else 0)


@command(app, recipe=RECIPE)
def compile(
    recipe: "Recipe",
    topology: Annotated[
        str, typer.Option(help="Target devices: h100:N, a100:N, v5e:AxB, v6e:AxB or v5p:AxBxC.", show_default=False)
    ],
    fit: Annotated[
        bool,
        typer.Option(
            "--fit", help="Search train.microbatch and train.remat for the highest predicted tokens/s. Default: off."
        ),
    ] = False,
) -> Result:
    """Compile the train step for other hardware.

    The hardware need not be attached. Prints memory per device in GiB, kernels, collectives and the predicted step
    time. Needs the extra compile-gpu or compile-tpu. Writes no output.
    """
    from ipt_jax.compile.command import print_result, run_compile

    result = run_compile(recipe, topology, fit)
    return Shown(result, view=lambda: print_result(result))


@command(app, "import")
def import_(
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face directory with safetensors.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint directory to write.", show_default=False)],
) -> Result:
    """Convert a Hugging Face model to a checkpoint.

    Reads the weights one tensor at a time. Writes the checkpoint and its tokenizer to --output. A rerun replaces a
    checkpoint there; any other content is an error.
    """
    from ipt_jax.hf.convert import run_import

    return run_import(hf_dir, output)


@command(app)
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="Run directory, step directory, or output of `ipt import`.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Hugging Face directory to write.", show_default=False)
    ],
    dtype: Annotated[
        str | None, typer.Option(help="Type of the weights: float32 or bfloat16. Default: that of the checkpoint.")
    ] = None,
) -> Result:
    """Convert a checkpoint to a Hugging Face model.

    Writes safetensors, configuration and tokenizer to --output. transformers and vLLM load the directory. A rerun
    replaces an export there; any other content is an error.
    """
    from ipt_jax.hf.convert import run_export

    result = run_export(checkpoint, output, dtype)

    def view() -> None:
        show(result, as_json=False)
        print(f"written to {output}; load it with transformers.AutoModelForCausalLM.from_pretrained({str(output)!r})")

    return Shown(result, view=view)


@command(app, "eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory, run or checkpoint.", show_default=False)],
    tasks: Annotated[
        str, typer.Option(help="Files, as [NAME=]FILE.jsonl or .txt separated by commas.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="JSON file of results to write. Default: none.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum rows per task. Default: all.")] = None,
) -> Result:
    """Evaluate a model on task files.

    Tasks are multiple-choice, exact-match, or plain text, for which bits per byte and perplexities are measured. Prints
    each score, with its standard error where it has one. With --output FILE.json, writes the results to it and one line
    per question to FILE.rows.jsonl. A rerun overwrites both.
    """
    from ipt_jax.evaluate import run_eval

    result = run_eval(str(model), tasks.split(","), output=output, limit=limit)
    scores = {name: _score(task) for name, task in result["tasks"].items()}
    return Shown(result, view=lambda: show(scores, as_json=False))


@command(app, recipe="ipt_jax.ablate.run:AblateSettings")
def ablate(settings: "AblateSettings") -> Result:
    """Train and compare arms at equal tokens.

    Trains each arm once per seed, evaluates all, and prints the difference per task with an interval. Writes runs,
    evaluations, ablation.json and ablation.html to `output`. Rerun the same command to resume. SIGTERM and SIGINT
    save a checkpoint and exit with code 143.
    """
    from ipt_jax.ablate.comparison import print_results
    from ipt_jax.ablate.run import run_ablate

    results, finished = run_ablate(settings)
    return Shown(results, view=lambda: print_results(results)) if finished else Shown(results, exit_code=STOPPED)


@command(app)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories of `ipt train`.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.", show_default=False)],
    evals: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="Results of `ipt eval -o`. Repeat the option once per run. Default: none."),
    ] = None,
    groups: Annotated[
        Path | None, typer.Option(help="Output of `synth run` to show samples of. Default: none.")
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Training report",
) -> Result:
    """Write a report of training runs.

    The report is one self-contained HTML page with loss curves, token mix, evaluations and samples. A rerun overwrites
    it.
    """
    from ipt_jax.report import run_report

    return run_report(runs, output, evals=evals or [], groups=groups, title=title)


def _score(task: dict[str, Any]) -> str:
    spread = "" if task["stderr"] is None else f" ± {task['stderr']:.4f}"
    return f"{task['metric']} {task['value']:.4f}{spread} (n = {task['n']:,})"


if __name__ == "__main__":  # python -m ipt_jax.cli, without the installed console script
    main()
