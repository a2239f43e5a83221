"""One policy for layers and one for tokens, together: what each saves.

python examples/combine.py
python examples/combine.py --model FOLDER --layers "heuristic" --tokens "tova:keep=0.3" --budget 0.85
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

import anee

PROMPT = "It was late in the evening when the old man came back to the house by the river, and"


def main() -> None:
    """Generate under neither, either and both, and print what each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="model source, hub id or local folder")
    parser.add_argument("--layers", default="static:skip=12 17", help="a layer policy")
    parser.add_argument("--tokens", default="tova:keep=0.5", help="a token policy")
    parser.add_argument("--budget", type=float, default=None)
    arguments = parser.parse_args()
    model = anee.load(arguments.model)
    table = Table("policy", "layers run", "layer FLOPs", "context dropped", "K/V bytes", "text")
    for policy in ("dense", arguments.layers, arguments.tokens, f"{arguments.layers}+{arguments.tokens}"):
        budget = arguments.budget if policy.startswith(arguments.layers) else None
        adaptive = anee.load(model.model, policy, budget, tokenizer=model.tokenizer)
        result = adaptive.generate(PROMPT, max_new_tokens=24)
        trace = result.trace
        table.add_row(
            policy, f"{trace.layers_run:.0%}", f"{trace.budget_spent:.0%}", f"{trace.context_dropped:.0%}",
            f"{trace.kv_bytes:,}", result.completion.strip(),
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
