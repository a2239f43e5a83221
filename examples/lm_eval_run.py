"""Score a model under a policy inside a run of lm-eval, from a file on disk; beside each score, what it took.

python examples/lm_eval_run.py
python examples/lm_eval_run.py --model FOLDER --policy "static:skip=5" --tasks-dir DIR --tasks lambada_openai,piqa
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import anee
from anee.lm_eval.options import TaskOptions
from anee.lm_eval.run_tasks import run_tasks

SENTENCES = {"The capital of France is": "Paris", "One, two, three, four,": "five", "Hot is the opposite of": "cold"}


def main() -> None:
    """Score dense and under the policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="model source, hub id or local folder")
    parser.add_argument("--policy", default="static:skip=14")
    parser.add_argument("--tasks", default="last_word")
    parser.add_argument("--tasks-dir", type=Path, help="folder with NAME.jsonl. Default: three sentences")
    parser.add_argument("--limit", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as own:
        lines = [json.dumps({"context": context, "continuation": last}) for context, last in SENTENCES.items()]
        (Path(own) / "last_word.jsonl").write_text("\n".join(lines) + "\n")
        model = anee.load(arguments.model)
        for policy in ("dense", arguments.policy):
            adaptive = anee.load(model.model, policy, tokenizer=model.tokenizer)
            folder = arguments.tasks_dir or Path(own)
            found = run_tasks(adaptive, arguments.tasks.split(","), options=TaskOptions(folder, arguments.limit))
            for name, task in found["tasks"].items():
                print(f"{policy}: {name}: {task['scores']}, layer FLOPs spent {task['spent']['budget spent']:.1%}")


if __name__ == "__main__":
    main()
