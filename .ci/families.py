"""Names the configs for the oldest transformers: a sample of each kind of layer, and families that have changed.

    python .ci/families.py            # prints --config FILE --config FILE ...
    python .ci/families.py --record   # notes what families are now: after all were checked (`make conformance`)

A family has changed if its config or the file of its adapter is not what it was when all were last checked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "tests" / "configs"
RECORD = ROOT / "docs" / "results" / "conformance-sources.json"
SAMPLE = ("gpt2", "llama", "qwen2-sliding", "falcon-multi-query", "gemma2", "qwen3-moe")
"""Learned positions; grouped queries; windows in some layers; a tuple and a fused projection; soft caps; experts."""


def sources() -> dict[str, str]:
    """Return a digest of each config and of the adapter file that serves its family, by the config's name."""
    table = (ROOT / "anee_adapters" / "__init__.py").read_text()
    files = dict(re.findall(r"from anee_adapters\.(\w+) import ([\w, ]+)", table))
    served = {name.strip(): module for module, names in files.items() for name in names.split(",")}
    kinds = {kind: served[adapter] for kind, adapter in re.findall(r'"(\w+)": (\w+)\(\)', table) if adapter in served}
    found = {}
    for path in sorted(CONFIGS.glob("*.json")):
        module = kinds[json.loads(path.read_text())["model_type"]]
        content = path.read_bytes() + (ROOT / "anee_adapters" / f"{module}.py").read_bytes()
        found[path.stem] = hashlib.sha256(content).hexdigest()[:16]
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
