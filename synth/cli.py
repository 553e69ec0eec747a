"""The `synth` command: collect, run, eval, mine, verify, decontaminate, render, miniworld, inspect.

Each command checks its settings, runs one stage and prints the stage's figures. Stages are imported when their command
runs, so that `synth collect` starts without an engine.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ipt_jax.core.cli_support import Result, Shown, command, run_app, show
from ipt_jax.core.errors import UserError

if TYPE_CHECKING:
    from synth.collect.run import CollectSettings
    from synth.config import RunSettings
    from synth.decontaminate.run import DecontaminateSettings
    from synth.evaluate.run import EvalSettings
    from synth.mine.run import MineSettings
    from synth.render.documents import RenderSettings
    from synth.verify.run import VerifySettings

app = typer.Typer(
    name="synth",
    help="Synthesize question-answer pairs from raw text, and render both into documents.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


def main() -> None:
    run_app(app)


@command(app, recipe="synth.collect.run:CollectSettings")
def collect(
    settings: "CollectSettings",
    report: Annotated[
        Path | None,
        typer.Option("-o", "--report", help="HTML file to write: counts, examples, what was dropped. Default: none."),
    ] = None,
) -> Result:
    """Convert QA data sets to tuning documents.

    Reads question-answering data sets. Writes one shard of documents per data set, for tuning a synthesizer, to
    `output`, and a page about them to --report. Rerun the same command to resume.
    """
    from synth.collect.collection_page import write_collection_page
    from synth.collect.run import run_collect

    result = run_collect(settings)
    if report is not None:
        result["report_bytes"] = write_collection_page(settings.output, report)
    return result


@command(app, recipe="synth.config:RunSettings")
def run(
    settings: "RunSettings",
    estimate: Annotated[
        int | None,
        typer.Option(
            help="Dry run: synthesize this many sample texts for each of M = 1, 2 and 3 and estimate time and cost of "
            "the full corpus. Writes no output. Default: off.",
            min=3,
        ),
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Dollars per GPU hour, for --estimate. Default: no cost shown.", min=0)
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Rerun groups that contain a failed text. Default: off.")
    ] = False,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend", help="Add groups of texts that the corpus has gained to the groups in the output. Default: off."
        ),
    ] = False,
) -> Result:
    """Generate question-answer pairs for raw text.

    A synthesizer model writes the pairs. Writes shards of groups (texts with their pairs) to `output`. Rerun the same
    command to resume; finished groups are kept. Exits with code 1 if no pair was accepted; the output is kept.
    """
    if extend and estimate is not None:
        raise UserError("--extend: cannot be combined with --estimate, which writes no output; remove one")
    if retry_failed and estimate is not None:
        raise UserError("--retry-failed: cannot be combined with --estimate, which writes no output; remove one")
    if estimate is None and price_per_hour is not None:
        raise UserError("--price-per-hour: requires --estimate N; add it, or remove the price")
    if estimate is None:
        from synth.generate.run import run_synth

        result = run_synth(settings, retry_failed=retry_failed, extend=extend)
        return Shown(result, exit_code=0 if result["pairs"] else 1)
    from synth.generate.estimate import run_estimate, show_estimate

    result = run_estimate(settings, estimate, price_per_hour)
    return Shown(result, view=lambda: show_estimate(result))


@command(app, recipe="synth.render.documents:RenderSettings")
def render(settings: "RenderSettings") -> Result:
    """Render groups into augmented documents.

    Joins texts and pairs through templates. Writes shards of documents to `output`, and a data set for the Hugging Face
    Hub if `hub` is set. Runs on CPUs. Rerun the same command to resume.
    """
    from synth.render.run import run_render

    return run_render(settings)


@command(app, recipe="synth.decontaminate.run:DecontaminateSettings")
def decontaminate(settings: "DecontaminateSettings") -> Result:
    """Remove texts that overlap with benchmarks.

    Finds pairs and texts that share a run of words with benchmark data. Writes a clean copy of each input to a folder
    of `output`, and every match to removed.jsonl. In groups, matching pairs and texts are marked and excluded from
    rendering; matching documents and raw texts are removed. Rerun the same command to resume.
    """
    from synth.decontaminate.run import run_decontaminate, show_report

    result = run_decontaminate(settings)

    def view() -> None:
        show(result, as_json=False, hide=("benchmarks",))
        show_report(result)

    return Shown(result, view)


@command(app, recipe="synth.mine.run:MineSettings")
def mine(settings: "MineSettings") -> Result:
    """Generate question-answer pairs by rules.

    No model runs. This is the paper's rule-based baseline. Writes shards of groups in the format of `synth run` to
    `output`. Runs on CPUs. Rerun the same command to resume.
    """
    from synth.mine.run import run_mine

    return run_mine(settings)


@command(app, recipe="synth.verify.run:VerifySettings")
def verify(settings: "VerifySettings") -> Result:
    """Score question-answer pairs.

    Writes copies of the groups with scores on their pairs to `output`. No pair is deleted. Rerun the same command to
    resume.
    """
    from synth.verify.run import run_verify

    return run_verify(settings)


@command(app, "eval", recipe="synth.evaluate.run:EvalSettings")
def evaluate(settings: "EvalSettings") -> Result:
    """Score a synthesizer on held-out questions.

    Measures its answers to gold questions, its pairs against gold pairs, their diversity, and how much they help
    another model. Existing groups or the rules of `synth mine` can be scored instead. Writes results.json, report.html
    and the scored groups to `output`. Rerun the same command to resume.
    """
    from synth.evaluate.quality import show_results
    from synth.evaluate.run import run_evaluate

    result = run_evaluate(settings)
    return Shown(result, view=lambda: show_results(result))


@command(app)
def miniworld(
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.", show_default=False)],
    articles: Annotated[int, typer.Option(help="Number of raw articles.", min=2)] = 4000,
    people: Annotated[
        int | None, typer.Option(help="Number of people they are about. Default: an eighth of the articles.", min=2)
    ] = None,
    paired: Annotated[float, typer.Option(help="Share of people whose articles synthesis may convert.")] = 0.5,
    tuning_articles: Annotated[int, typer.Option(help="Number of articles with pairs, for tuning.", min=1)] = 12_000,
    seed: Annotated[int, typer.Option(help="Random seed. Different seeds generate different worlds.")] = 0,
) -> Result:
    """Generate a synthetic world for tests.

    The world replaces a corpus in the quickstart. Writes raw articles, question-answering data sets, instructions,
    held-out questions and a tokenizer to --output. A rerun with the same options keeps a finished world and restarts an
    unfinished one.
    """
    from synth.miniworld import run_miniworld

    return run_miniworld(
        output, articles=articles, people=people, paired=paired, tuning_articles=tuning_articles, seed=seed
    )


@command(app)
def inspect(
    groups: Annotated[
        Path, typer.Argument(help="Output of `synth run`, `mine`, `verify` or `decontaminate`.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="HTML file to write. Default: print to the terminal.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Number of groups to show.", min=1)] = 5,
    sample: Annotated[int, typer.Option(help="Number of groups counted in the charts of the page.", min=1)] = 10_000,
    rejected: Annotated[bool, typer.Option(help="Show rejected pairs with their reasons.")] = True,
) -> Result:
    """Show synthesized groups.

    Shows texts, pairs, the evidence of answers and reasons for rejection. Prints to the terminal, or writes an HTML
    page with --output. A rerun overwrites the page.
    """
    from synth.inspect.run import run_inspect

    return Shown(*run_inspect(groups, output, limit, sample, rejected))


if __name__ == "__main__":  # python -m synth.cli, without the installed console script
    main()
