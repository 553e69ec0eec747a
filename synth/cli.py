"""The `synth` command: collect, run, render, verify, miniworld, inspect.

Each command checks its settings, runs one stage and prints the stage's figures. Stages are imported when their command
runs, so that `synth collect` starts without an engine.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ipt_jax.corpus.command import AsJson, Config, Overrides, quiet_stdout, run_app, show
from ipt_jax.corpus.settings import load_settings

app = typer.Typer(
    name="synth",
    help="Write question-answer pairs grounded in raw text, and documents made of both.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

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
    retry_failed: RetryFailed = False,
    as_json: AsJson = False,
) -> None:
    """Raw text and a synthesizer make groups of texts with pairs; run again, it goes on."""
    from synth.config import RunSettings
    from synth.run import run_synth

    settings = load_settings(RunSettings, config, overrides)
    with quiet_stdout():
        result = run_synth(settings, retry_failed=retry_failed)
    show(result, as_json)


@app.command()
def render(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Groups become augmented documents through templates."""
    from synth.render import RenderSettings, run_render

    settings = load_settings(RenderSettings, config, overrides)
    with quiet_stdout():
        result = run_render(settings)
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
