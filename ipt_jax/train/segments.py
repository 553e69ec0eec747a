"""Changes within a run: what may change at a step, consent to it, and the history of segments in run.json.

Guarantees: a setting that influences the weights never changes silently. It changes at the step of a checkpoint, with
consent (`ipt train --change`), is printed before training and recorded in run.json. A restart of a changed run needs no
further consent. What rows, weights and optimizer state depend on is refused, with the reason. Imports no JAX.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ipt_jax.config import Recipe, rows_per_step
from ipt_jax.core.checkpoint_digests import numbered
from ipt_jax.core.errors import UserError
from ipt_jax.core.manifest import difference, flatten
from ipt_jax.data.mixture import DataSettings
from ipt_jax.data.plan import Mix, Plan, continue_plan, open_mix, run_segments
from ipt_jax.model.config import ModelConfig

# Fields that stay as they are within a run, by how they begin, and why.
FIXED = {
    "model.": "a run keeps its model; model.from starts another run from its weights",
    "data.": "the order of rows follows from it",
    "contents of": "the rows trained so far came from them",
    "converted of": "the documents of the source follow from it",
    "optimizer.name": "the optimizer state is of another kind",
    "train.seed": "the weights were drawn with it",
}
Changes = dict[str, list[Any]]  # field: [before, now]


def made_with(recipe: Recipe, model: ModelConfig, identity: dict[str, Any]) -> dict[str, Any]:
    """The settings that influence the weights, as a checkpoint stores them. `identity`: that of the plan or mix."""
    return {
        "data": identity | {"cross_document": recipe.data.cross_document},
        "model": model.model_dump(),
        "optimizer": recipe.optimizer.model_dump(exclude={"moments_dtype"}),
        "train": {"seed": recipe.train.seed, "z_loss": recipe.train.z_loss},
    }


def run_settings(made_with: dict[str, Any]) -> dict[str, Any]:
    """The same by field of the recipe; amounts by source."""
    data = {name: value for name, value in made_with["data"].items() if name not in ("segments", "rows_per_step")}
    sources = data.pop("sources")
    fields = flatten(made_with | {"data": data})
    fields["train.batch_tokens"] = made_with["data"]["rows_per_step"] * data["seq_len"]
    for what in ("contents", "converted", "tokens"):
        fields |= {f"{what} of source {source['name']!r}": source[what] for source in sources}
    return fields


def find_changes(before: dict[str, Any], now: dict[str, Any]) -> Changes:
    """The fields that differ, but for the contents of new sources."""
    old, new = run_settings(before), run_settings(json.loads(json.dumps(now)))
    names, others = ([source["name"] for source in one["data"]["sources"]] for one in (before, now))
    kept = [name for name in others if name in names]
    if before["data"].get("held_out_share"):
        kept = others  # a new source would change which documents of the others are held out
    changed: Changes = {} if kept == names else {"data.sources": [names, kept]}  # removed, or in another order
    for field in dict.fromkeys([*new, *old]):
        added = field not in old and field.startswith(("contents", "converted"))
        if old.get(field) != new.get(field) and not added:
            nothing = 0 if field.startswith("tokens of") else None  # a new source has given none
            changed[field] = [old.get(field, nothing), new.get(field)]
    return changed


def accept_changes(
    run_dir: Path, step: int, before: dict[str, Any], now: dict[str, Any], data: DataSettings, *, consent: bool
) -> Changes:
    """What changes at `step`. Raises UserError for what cannot change, and for a change without consent."""
    changed = find_changes(before, now)
    where = f"run_dir {run_dir}: its checkpoint at step {step} was made with"
    for field, values in changed.items():
        reason = next((why for begin, why in FIXED.items() if field.startswith(begin)), None)
        if field == "data.sources" and set(values[0]) < set(values[1]):
            reason = "data.held_out_share: which documents are held out would change with a new source"
        if reason:
            raise UserError(
                f"{where} {field}={difference(*values)}; set another run_dir, or restore the old value ({reason})"
            )
    agreed = any(one["step"] >= step and one["changed"] == changed for one in read_history(run_dir))
    if changed and not consent and not agreed:
        fields = ", ".join(f"{_field(field, data)}={difference(*values)}" for field, values in changed.items())
        raise UserError(
            f"{where} {fields}; add --change to change this from step {step} on, set another run_dir, or restore the "
            f"old value{'s' if len(changed) > 1 else ''}"
        )
    return changed


def _field(field: str, data: DataSettings) -> str:
    """With the field of the recipe that states the amount of a source."""
    for number, source in enumerate(data.sources):
        if field == f"tokens of source {source.name!r}":
            stated = source.asked.split()[0]
            of_budget = stated not in ("epochs", "tokens") and data.tokens is not None
            path = "data.tokens" if of_budget else f"data.sources.{number}.{stated}"
            return f"{path} ({field})"
    return field


def change_lines(step: int, changed: Changes) -> list[str]:
    """`from step 120: optimizer.learning_rate 0.0003 -> 0.0001`"""
    return [f"from step {step}: {field} {_text(before)} -> {_text(now)}" for field, (before, now) in changed.items()]


def _text(value: Any) -> str:
    plain = "null" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else plain


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """The segments in run.json, in order; none without the file."""
    file = run_dir / "run.json"
    if not file.is_file():
        return []
    try:
        found: list[dict[str, Any]] = json.loads(file.read_bytes()).get("segments", [])
        return found
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: is damaged ({error}); move it away to resume without its history") from error


def extend_history(history: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The segments up to the step of `entry`, and `entry` itself if anything but its step differs from the last."""
    kept = [one for one in history if one["step"] < entry["step"]]
    own = ("step", "tokens", "changed")
    described = {name: value for name, value in entry.items() if name not in own}
    same = kept and described == {name: kept[-1].get(name) for name in described}
    return kept if same and not entry["changed"] else [*kept, entry]


def continue_run(mix: Mix, recipe: Recipe, before: dict[str, Any], step: int) -> Plan:
    """The plan of a run that was `made_with` `before` up to `step`."""
    return continue_plan(mix, rows_per_step=rows_per_step(recipe), past=run_segments(before["data"]), step=step)


def plan_of_run(recipe: Recipe) -> tuple[Plan, int]:
    """The plan of a recipe, and the steps that its run has done. Of a run that the recipe does not continue: 0."""
    mix = open_mix(recipe.data)
    step, before = _newest_record(recipe)
    if before is None:
        return Plan(mix, rows_per_step=rows_per_step(recipe)), 0
    data = {"data": mix.identity(rows_per_step(recipe)) | {"cross_document": recipe.data.cross_document}}
    for field, values in find_changes({"data": before["data"]}, data).items():
        if any(field.startswith(begin) for begin in FIXED):
            print(
                f"warning: this plan is not that of the run in {recipe.run_dir}, which was made with {field}="
                f"{difference(*values)}", file=sys.stderr,
            )  # fmt: skip
            return Plan(mix, rows_per_step=rows_per_step(recipe)), 0
    return continue_run(mix, recipe, before, step), step


def _newest_record(recipe: Recipe) -> tuple[int, dict[str, Any] | None]:
    """Step and settings of the checkpoint that `ipt train` would resume from, not verified."""
    found = numbered(Path(recipe.run_dir) / "checkpoints")
    if not found and recipe.train.branch_from:
        path = Path(recipe.train.branch_from)
        found = [path] if path.name.isdigit() else numbered(path / "checkpoints")
    for path in found:
        try:
            record = json.loads((path / "record" / "record.json").read_bytes())
            return record["step"], record["made_with"]
        except (OSError, ValueError, KeyError):
            continue  # `ipt train` skips it too, and says why
    return 0, None
