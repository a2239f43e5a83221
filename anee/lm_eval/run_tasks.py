"""Scores of lm-eval's tasks under a policy, with what each took."""

from __future__ import annotations

from typing import Any

from anee.lm_eval.options import TaskOptions
from anee_core.errors import InputError, MissingPackageError


def run_tasks(
    model: Any,
    tasks: list[str],
    policy: str | None = None,
    budget: float | None = None,
    options: TaskOptions | None = None,
) -> dict[str, Any]:
    """Return scores, their standard errors, and what was spent per token, task by task.

    Args:
        model: whatever `anee.load` takes, or an `AdaptiveModel` that has a policy already.
        tasks: names of lm-eval's tasks, or of tasks in the options' ``tasks_dir``: of YAML files as lm-eval takes them,
            or of JSONL files, see `local_task`.
        policy: a policy string.
        budget: share of the dense decoder-layer FLOPs that may be spent.
        options: how they are scored; see `AneeLM` for the modes.

    Raises:
        MissingPackageError: lm-eval is not installed.
        InputError: an unknown task, or a file that holds none.
    """
    options = options or TaskOptions()
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from anee.lm_eval.harness import AneeLM
    except ImportError as error:
        raise MissingPackageError("evaluation needs lm-eval: pip install 'anee[eval]'") from error
    from anee.lm_eval.local_tasks import find_tasks

    wanted = find_tasks(tasks, options.tasks_dir)
    mode: Any = options.mode
    lm = AneeLM(model, policy, budget, mode=mode, dtype=options.dtype, device=options.device, batch_size=options.batch)
    named = {task for task in wanted if isinstance(task, str)}
    folder = None if options.tasks_dir is None else str(options.tasks_dir)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not named <= set(manager.all_tasks):
        # Reading the thousands of tasks that lm-eval has takes longer than scoring a few examples.
        manager = TaskManager(include_path=folder)
    unknown = named - set(manager.all_tasks)
    if unknown:
        raise InputError(f"lm-eval knows no task '{min(unknown)}', and it is none of --tasks-dir")
    found: dict[str, Any] = {}
    for task in wanted:
        lm.start_counting()
        results = simple_evaluate(
            lm, tasks=[task], limit=options.limit, task_manager=manager, log_samples=False, bootstrap_iters=1000
        )
        for task_name, scores in results["results"].items():
            values = {
                key.split(",")[0]: v for key, v in scores.items() if isinstance(v, float) and "_stderr" not in key
            }
            errors = {
                key.split(",")[0].removesuffix("_stderr"): v
                for key, v in scores.items()
                if isinstance(v, float) and "_stderr" in key
            }
            examples = results["n-samples"].get(task_name, {}).get("effective", 0)
            found[task_name] = {"scores": values, "errors": errors, "examples": examples, "spent": lm.spent()}
    adaptive = lm.model
    facts = {"policy": adaptive.policy.title, "budget": adaptive.budget, "mode": options.mode, "limit": options.limit}
    return {"model": adaptive.name, **facts, "tasks": found}
