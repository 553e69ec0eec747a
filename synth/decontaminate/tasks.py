"""The test and validation documents of lm-eval tasks: the one module that imports lm_eval for decontamination.

Nothing is fetched: a task's data lie on this machine or in the hub's cache (HF_HUB_OFFLINE=0 allows fetching).
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ipt_jax.corpus.settings import UserError


def task_rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(id, document) of every document of a task, of all tasks of a group or tag, or of a task's YAML file."""
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(variable, "1")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"benchmark task {name}: lm_eval is not installed; run launch/setup.sh evals") from error
    try:
        # The index of all tasks takes seconds, and a task's own file needs none of it.
        tasks = TaskManager(include_defaults=not Path(name).is_file()).load(name)["tasks"]
    except Exception as error:  # whatever lm_eval and datasets raise: no such task, no data, a broken YAML file
        raise UserError(
            f"benchmark task {name}: cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]}); "
            "check its name, and that its data lie on this machine"
        ) from error
    for task_name, task in tasks.items():
        splits = {"test": task.test_docs if task.has_test_docs() else None}
        splits["validation"] = task.validation_docs if task.has_validation_docs() else None
        for split, documents in splits.items():
            for number, document in enumerate(documents() or () if documents else ()):
                yield f"{task_name}/{split}/{number}", dict(document)
