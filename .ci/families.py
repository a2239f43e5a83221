"""Names the configs for the oldest transformers: a sample of each kind of layer, and families that have changed.

    python .ci/families.py            # prints --config FILE --config FILE ...
    python .ci/families.py --record   # notes what families are now: after all were checked (`make conformance`)

A family has changed if its config, the file of its adapter's class, or its layout or recipe is not what it was when all
were last checked.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
from dataclasses import replace
from pathlib import Path

from anee_adapters import anee_adapters
from anee_core.conformance.tiny import read_configs

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "tests" / "configs"
RECORD = ROOT / "docs" / "results" / "conformance-sources.json"
SAMPLE = ("gpt2", "llama", "qwen2-sliding", "falcon-multi-query", "gemma2", "qwen3-moe")
"""Learned positions; grouped queries; windows in some layers; a tuple and a fused projection; soft caps; experts."""


def sources() -> dict[str, str]:
    """Return a digest of each config and of what serves its family, by the config's name."""
    adapters, found = anee_adapters(), {}
    for name, config in read_configs(CONFIGS).items():
        adapter = adapters[config.model_type]
        recipe = adapter.recipe(config)
        # The set of class names has no order of its own.
        kinds = None if recipe is None else (sorted(recipe.layers), replace(recipe, layers=frozenset()))
        table = repr((adapter.layout_for(config), kinds)).encode()
        content = (CONFIGS / f"{name}.json").read_bytes() + Path(inspect.getfile(type(adapter))).read_bytes() + table
        found[name] = hashlib.sha256(content).hexdigest()[:16]
    return found


def main() -> None:
    """Print the options of `anee conformance`, or note what families are now."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    now = sources()
    if parser.parse_args().record:
        RECORD.write_text(json.dumps(now, indent=1) + "\n")
        return
    known = json.loads(RECORD.read_text())
    chosen = [name for name, digest in now.items() if name in SAMPLE or known.get(name) != digest]
    print(" ".join(f"--config {(CONFIGS / name).relative_to(ROOT)}.json" for name in chosen))


if __name__ == "__main__":
    main()
