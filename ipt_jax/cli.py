"""The `ipt` command: tokenize, plan, show, train, compile, import, export, eval, report.

Each command checks its settings, runs one stage and prints the stage's figures. Stages are imported when their command
runs, so that `ipt plan` starts without jax.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from ipt_jax.corpus.command import AsJson, Config, Overrides, quiet_stdout, run_app, show
from ipt_jax.corpus.settings import load_settings

STOPPED = 143  # 128 + SIGTERM, as the shell reports it: saved and unfinished, so that a scheduler starts it again

app = typer.Typer(
    name="ipt",
    help="Pre-train language models on instruction-augmented text.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


def main() -> None:
    run_app(app)


@app.command()
def tokenize(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Documents, JSON Lines (.gz, .zst), Parquet, Arrow, TFDS and Hugging Face data sets become token shards."""
    from ipt_jax.data.tokenize import TokenizeSettings, run_tokenize

    settings = load_settings(TokenizeSettings, config, overrides)
    with quiet_stdout():
        result = run_tokenize(settings)
    show(result, as_json)


@app.command()
def plan(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Solve and print the token mix of a training recipe; refuse what cannot be met."""
    from ipt_jax.config import Recipe, check_schedule, rows_per_step
    from ipt_jax.data.plan import build_plan, print_plan

    recipe = load_settings(Recipe, config, overrides)
    with quiet_stdout():
        solved = build_plan(recipe.data, rows_per_step=rows_per_step(recipe))
        check_schedule(recipe, solved.steps)
    if as_json:
        show(solved.summary(), as_json)
    else:
        print_plan(solved)


@app.command("show")
def show_rows(
    config: Config,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="Rows to show.", min=1)] = 4,
    step: Annotated[int, typer.Option(help="The step whose rows come first.", min=0)] = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="An HTML page instead of the terminal.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show rows of a training recipe's plan: decoded, coloured by kind, and by what the loss counts."""
    from ipt_jax.config import Recipe, rows_per_step
    from ipt_jax.data.plan import build_plan
    from ipt_jax.show import run_show

    recipe = load_settings(Recipe, config, overrides)
    with quiet_stdout():
        solved = build_plan(recipe.data, rows_per_step=rows_per_step(recipe))
    with quiet_stdout() if as_json else nullcontext():
        result = run_show(solved, output, step=step, rows=rows, quiet=as_json)
    if as_json or output:
        show(result, as_json)


@app.command()
def train(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Train a model. Rerun to resume from the latest checkpoint. SIGTERM saves a checkpoint and exits with code 143."""
    from ipt_jax.config import Recipe

    recipe = load_settings(Recipe, config, overrides)
    with quiet_stdout():
        from ipt_jax.train.loop import run_train

        result = run_train(recipe)
    show(result, as_json)
    if result["step"] < result["steps"]:
        raise typer.Exit(STOPPED)


@app.command()
def compile(
    config: Config,
    overrides: Overrides = None,
    topology: Annotated[
        str, typer.Option(help="h100:N, a100:N, v5e:AxB, v6e:AxB or v5p:AxBxC.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    fit: Annotated[
        bool, typer.Option("--fit", help="Search micro-batch and remat for the most predicted tokens/s.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compile the real train step for hardware that is not here: memory, kernels, collectives, predicted speed."""
    from ipt_jax.compile.command import print_result, run_compile
    from ipt_jax.config import Recipe

    recipe = load_settings(Recipe, config, overrides)
    with quiet_stdout():
        result = run_compile(recipe, topology, fit)
    if as_json:
        show(result, as_json)
    else:
        print_result(result)


@app.command("import")
def import_(
    hf_dir: Annotated[Path, typer.Argument(help="A Hugging Face directory with safetensors.", show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The checkpoint directory to write.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Read a Hugging Face model, tensor by tensor, into a checkpoint."""
    with quiet_stdout():
        from ipt_jax.hf.import_ import run_import

        result = run_import(hf_dir, output)
    show(result, as_json)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run, a step's directory, or an import.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="The HF directory to write.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as a Hugging Face model that transformers and vLLM read."""
    with quiet_stdout():
        from ipt_jax.hf.export import run_export

        result = run_export(checkpoint, output)
    show(result, as_json)


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="A Hugging Face directory, a run or a checkpoint.", show_default=False)],
    tasks: Annotated[str, typer.Option(help="Task files, [NAME=]FILE.jsonl, separated by commas.", show_default=False)],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A JSON file for the results.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first rows of each task.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score log-likelihood and exact-match tasks, with standard errors."""
    with quiet_stdout():
        from ipt_jax.evaluate import run_eval

        result = run_eval(str(model), tasks.split(","), output=output, limit=limit)
    if as_json:
        show(result, as_json)
    else:
        show({name: _score(task) for name, task in result["tasks"].items()}, as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML page to write.", show_default=False)],
    evals: Annotated[list[Path] | None, typer.Option("--eval", help="Results of `ipt eval -o`, one a run.")] = None,
    groups: Annotated[Path | None, typer.Option(help="Synthesized groups to show samples of.")] = None,
    title: Annotated[str, typer.Option(help="The page's title.")] = "Training report",
    as_json: AsJson = False,
) -> None:
    """One self-contained HTML page: curves, the mix, evaluations and samples."""
    from ipt_jax.report import run_report

    with quiet_stdout():
        result = run_report(runs, output, evals=evals or [], groups=groups, title=title)
    show(result, as_json)


def _score(task: dict[str, Any]) -> str:
    spread = "" if task["stderr"] is None else f" ± {task['stderr']:.4f}"
    return f"{task['metric']} {task['value']:.4f}{spread} (n = {task['n']:,})"


if __name__ == "__main__":  # python -m ipt_jax.cli: where the commands are not installed
    main()
