"""The `ipt` command: tokenize, plan, show, train, compile, import, export, eval, compare, ablate, report.

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
        list[str],
        typer.Option(
            help="Tasks, separated by commas; repeat to add more: [NAME=]FILE.jsonl, FILE.txt, or names, patterns and "
            "YAML files of lm-evaluation-harness (extra evals).",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="JSON file of results to write. Default: none.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Directory of task YAML files, searched first. Default: none.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in each prompt of harness tasks. Default: as the task says, else 0.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum rows per task. Default: all.")] = None,
    backend: Annotated[str, typer.Option(help="What computes: jax, hf (transformers) or vllm.")] = "jax",
    dtype: Annotated[str, typer.Option(help="Type of weights and products: float32 or bfloat16.")] = "float32",
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens per batch, padding included. Default: 4096 on CPUs, else 32768.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Context to use, in tokens. Default: that of the model.")
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option("--bos/--no-bos", help="BOS before each prompt. Default: as transformers encodes the model."),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(help="Devices as DATA,FSDP,TENSOR, such as 1,8,1. Default: a copy of the model on each device."),
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Write the harness's samples_TASK_DATE.jsonl too. Default: off.")
    ] = False,
) -> Result:
    """Evaluate a model on tasks.

    Prints each score, with its standard error where it has one. With --output FILE.json, writes the results in the
    shape of lm-evaluation-harness and one line per question to FILE.rows.jsonl. Rerun the same command after an
    interruption to resume: finished requests are kept in FILE.json.journal. A rerun of a finished one overwrites.
    """
    from ipt_jax.evaluate import run_eval

    result = run_eval(
        str(model), tasks, output=output, include_path=include_path, num_fewshot=num_fewshot, limit=limit,
        backend=backend, dtype=dtype, batch_tokens=batch_tokens, max_length=max_length, add_bos=bos, mesh=mesh,
        log_samples=log_samples,
    )  # fmt: skip
    return Shown(result, view=lambda: _show_scores(result))


@command(app)
def compare(
    first: Annotated[Path, typer.Argument(help="Results of `ipt eval -o`: A.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Results of another model on the same tasks: B.", show_default=False)],
) -> Result:
    """Compare two models question by question.

    Prints the difference B - A of each task's headline metric with its standard error and a paired test: McNemar's for
    right and wrong answers, a permutation test for other scores. Reads FILE.rows.jsonl beside each result.
    Writes no output.
    """
    from ipt_jax.evaluate.compare import run_compare, show_comparison

    result = run_compare(first, second)
    return Shown(result, view=lambda: show_comparison(result))


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


def _show_scores(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading, side in (
        ("task", "left"),
        ("n", "right"),
        ("metric", "left"),
        ("value", "right"),
        ("stderr", "right"),
    ):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for task, entry in result["results"].items():
        named, n = task, f"{entry['sample_len']:,}" if "sample_len" in entry else ""
        for key, value in entry.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = entry.get(f"{metric}_stderr,{kept}")
            spread = f"± {stderr:.4f}" if isinstance(stderr, float) else ""
            table.add_row(named, n, metric if kept == "none" else key, f"{value:.4f}", spread)
            named = n = ""
    Console(highlight=False).print(table)


if __name__ == "__main__":  # python -m ipt_jax.cli, without the installed console script
    main()
