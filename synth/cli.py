"""The `synth` command: collect, run, mine, verify, decontaminate, render, miniworld, inspect.

Each command checks its settings, runs one stage and prints the stage's figures. Stages are imported when their command
runs, so that `synth collect` starts without an engine.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ipt_jax.corpus.command import AsJson, Config, Overrides, quiet_stdout, run_app, show
from ipt_jax.corpus.settings import UserError, load_settings

if TYPE_CHECKING:
    from synth.config import RunSettings

app = typer.Typer(
    name="synth",
    help="Write question-answer pairs grounded in raw text, and documents made of both.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
Estimate = Annotated[
    int | None,
    typer.Option(help="Write nothing; run so many texts for M = 1, 2, 3 each and tell what all would cost.", min=3),
]
PricePerHour = Annotated[float | None, typer.Option(help="Dollars a GPU and hour, for --estimate.", min=0)]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Ask again for groups that hold a failed text.")]


def main() -> None:
    run_app(app)


@app.command()
def collect(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Question-answering data sets become documents that tune a synthesizer."""
    from synth.collect import CollectSettings, run_collect

    settings = load_settings(CollectSettings, config, overrides)
    with quiet_stdout():
        result = run_collect(settings)
    show(result, as_json)


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    estimate: Estimate = None,
    price_per_hour: PricePerHour = None,
    retry_failed: RetryFailed = False,
    as_json: AsJson = False,
) -> None:
    """Raw text and a synthesizer make groups of texts with pairs; run again, it goes on."""
    from synth.config import RunSettings
    from synth.run import run_synth

    settings = load_settings(RunSettings, config, overrides)
    if retry_failed and estimate is not None:
        raise UserError("--retry-failed: asks again, and --estimate writes nothing; leave one of them out")
    if estimate is not None or price_per_hour is not None:
        return show_costs(settings, estimate, price_per_hour, as_json)
    with quiet_stdout():
        result = run_synth(settings, retry_failed=retry_failed)
    show(result, as_json)


def show_costs(settings: "RunSettings", size: int | None, price_per_hour: float | None, as_json: bool) -> None:
    from synth.estimate import run_estimate, show_estimate

    if size is None:
        raise UserError("--price-per-hour: is for --estimate N; add it, or leave the price out")
    with quiet_stdout():
        result = run_estimate(settings, size, price_per_hour)
    show(result, as_json) if as_json else show_estimate(result)


@app.command()
def render(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Groups become augmented documents through templates."""
    from synth.render import RenderSettings, run_render

    settings = load_settings(RenderSettings, config, overrides)
    with quiet_stdout():
        result = run_render(settings)
    show(result, as_json)


@app.command()
def decontaminate(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Pairs and texts that share words with benchmarks are listed, marked and kept out."""
    from synth.decontaminate.run import DecontaminateSettings, run_decontaminate, show_report

    settings = load_settings(DecontaminateSettings, config, overrides)
    with quiet_stdout():
        result = run_decontaminate(settings)
    show(result, as_json, hide=("benchmarks",))
    if not as_json:
        show_report(result)


@app.command()
def mine(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Pairs by rules instead of a synthesizer, the paper's baseline; output as of `synth run`."""
    from synth.mine.run import MineSettings, run_mine

    settings = load_settings(MineSettings, config, overrides)
    with quiet_stdout():
        result = run_mine(settings)
    show(result, as_json)


@app.command()
def verify(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Groups get scores on their pairs, in new shards; nothing is deleted."""
    from synth.verify.run import run_verify
    from synth.verify.settings import VerifySettings

    settings = load_settings(VerifySettings, config, overrides)
    with quiet_stdout():
        result = run_verify(settings)
    show(result, as_json)


@app.command()
def miniworld(
    output: Annotated[Path, typer.Option("-o", "--output", help="The directory to write.", show_default=False)],
    articles: Annotated[int, typer.Option(help="Raw articles to write.", min=1)] = 4000,
    tuning_articles: Annotated[int, typer.Option(help="Articles with pairs, as tuning data.", min=1)] = 12_000,
    seed: Annotated[int, typer.Option(help="Another seed, another world.")] = 0,
    as_json: AsJson = False,
) -> None:
    """A seeded invented world: raw articles, QA data sets, instructions, held-out questions."""
    from synth.miniworld import run_miniworld

    with quiet_stdout():
        result = run_miniworld(output, articles=articles, tuning_articles=tuning_articles, seed=seed)
    show(result, as_json)


@app.command()
def inspect(
    groups: Annotated[Path, typer.Argument(help="Output of `synth run`.", show_default=False)],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="An HTML page instead of the terminal.")] = None,
    limit: Annotated[int, typer.Option(help="Groups to show.", min=1)] = 5,
    sample: Annotated[int, typer.Option(help="Groups that a page's distributions count.", min=1)] = 10_000,
    rejected: Annotated[bool, typer.Option(help="Show rejected pairs with their reasons.")] = True,
    as_json: AsJson = False,
) -> None:
    """Show groups, readable."""
    from synth.inspect import run_inspect

    with quiet_stdout() if as_json else nullcontext():
        result = run_inspect(groups, output, limit, sample, rejected)
    if as_json or output:
        show(result, as_json)


if __name__ == "__main__":  # python -m synth.cli: where the commands are not installed
    main()
