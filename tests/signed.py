"""Checkpoints that were changed on purpose, with a checksum that agrees."""

from __future__ import annotations

import json

from anee_core.checkpoint import checksum


def sign(folder, name="policy", **changes):
    """Write changes into the header of a checkpoint, and then the checksum of what its files hold now."""
    place = folder / f"{name}.json"
    header = {**json.loads(place.read_text()), **changes}
    said = {key: value for key, value in header.items() if key != "checksum" and value is not ...}
    stored = (folder / f"{name}.safetensors").read_bytes()
    place.write_text(json.dumps({**said, "checksum": checksum(said, stored)}))
