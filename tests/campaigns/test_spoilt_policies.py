"""Saved policies, damaged or written by someone who means harm: refused in one line, or as good as they were."""

import json
import os
import random
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from signed import sign
from tiny import adaptive, gate_weights, shared, tokens

from anee_core.cache_policies import AsaWeights
from anee_core.errors import AneeError

KINDS = {
    "plain": "static:skip=1 3+window:sinks=1,recent=4",
    "drawn": "random:p=0.4,protect=0 0,seed=3+tova:keep=0.4,least=1",
    "calibrated": "heuristic:protect=1 1,spread=0.2",
    "gate": "gate:{weights},protect=1 1",
    "shortcuts": "random:p=0.5,protect=0 0+shortcuts:{weights}",
    "asa": "asa:{weights}",
    "all": "gate:{weights},protect=1 1+shortcuts:{weights}+asa:{weights},shift=0.1",
}
ODD = (
    None, True, False, 0, 1, 2, -1, 10**20, -(10**20), 10**4000, 0.0, 0.5, -0.5, 1e300, float("nan"), float("inf"),
    "", "x", "dense", "rl", "gate", "../gate", "/tmp", "somebody/name", "x" * 9000, "x" * 500_000, "\0", "\ud800",
    "a\nb", "window:recent=2", "static:skip=2", "static:skip=99", "gate:first=65000", "random:p=2", [], [1], {},
    {"a": 1}, [[[[]]]],
)  # fmt: skip
"""Values of all kinds for a place in a header."""
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64)
SECONDS = 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return folders by kind of policy, each with the logits that the policy gives."""
    folder = tmp_path_factory.mktemp("saved")
    gate, shortcuts = gate_weights()
    generator = torch.Generator().manual_seed(4)
    asa = AsaWeights(*(0.3 * torch.randn(6, 4, 32, generator=generator) for _ in range(2)), torch.zeros(6))
    for weights in (gate, shortcuts, asa):
        weights.save(folder / "weights")
    found = {}
    for kind, text in KINDS.items():
        budget = 0.8 if kind == "calibrated" else None
        adaptive(shared("llama"), text.format(weights=folder / "weights"), budget).policy.save(folder / kind)
        found[kind] = folder / kind, logits(folder / kind)
    return found


def logits(folder):
    with torch.inference_mode():
        return adaptive(shared("llama"), folder, calibration=None)(tokens()).logits


def flip(chance, data):
    for _ in range(chance.choice((1, 1, 8))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def cut(chance, data):
    start = chance.randrange(len(data))
    del data[start : chance.choice((len(data), start + 1, start + chance.randrange(1, 200)))]


def insert(chance, data):
    place = chance.randrange(len(data) + 1)
    data[place:place] = chance.randbytes(chance.choice((1, 4, 100))) if chance.random() < 0.7 else b"[" * 100_000


def zero(chance, data):
    start = chance.randrange(len(data))
    end = min(len(data), start + chance.choice((1, 8, 500)))
    data[start:end] = bytes(end - start)


def damage(chance, folder, file):
    """Change bytes of a file."""
    data = bytearray(file.read_bytes())
    chance.choice((flip, flip, cut, insert, zero))(chance, data)
    file.write_bytes(data)


def replace(chance, folder, file):
    """Put something else in the place of a file."""
    other = chance.choice([path for path in folder.rglob("*.*") if path != file])
    content = other.read_bytes()
    file.unlink()
    match chance.randrange(8):
        case 0:
            os.mkfifo(file)
        case 1:
            file.mkdir()
        case 2:
            file.symlink_to(chance.choice(("/dev/zero", "/dev/tty", "/proc/self/mem", "nowhere", file.name)))
        case 3:
            with file.open("wb") as sparse:
                sparse.truncate(1 << 40)
        case 4:
            file.write_bytes(chance.choice((b"", b"{}", b"[" * 900_000, b"1" * 900_000, b'{"a":' * 100_000)))
        case 5:
            other.write_bytes(content)
            file.symlink_to(other)
        case _:
            file.write_bytes(content)


def places(value, way=()):
    """Return the ways to all values in nested dicts."""
    below = [deeper for key in value for deeper in places(value[key], (*way, key))] if isinstance(value, dict) else []
    return ([way] if way else []) + below


def edit(chance, folder, file):
    """Change, remove, add or repeat a value of a header."""
    file = file.with_suffix(".json")
    header = json.loads(file.read_text())
    *way, last = chance.choice(places(header))
    inside = header
    for key in way:
        inside = inside[key]
    match chance.randrange(6):
        case 0:
            del inside[last]
        case 1:
            inside[f"{last}s"] = inside[last]
        case 2:
            text = json.dumps(header)
            file.write_text(f'{text[:-1]}, "{last}": {json.dumps(chance.choice(ODD[:20]))}}}')
            return
        case 3 if isinstance(inside[last], str):
            inside[last] = option(chance, inside[last])
        case _:
            inside[last] = chance.choice(ODD)
    file.write_text(json.dumps(header))


def option(chance, text):
    """Change the value of an option in a policy string, or add one."""
    name, _, given = text.partition(":")
    options = [piece for piece in given.split(",") if piece]
    value = chance.choice(("-1", "0", "1", "3", "0.5", "1e30", "nan", "9" * 30, "0 0", "../x", "none", "", "true"))
    if options and chance.random() < 0.7:
        place = chance.randrange(len(options))
        options[place] = f"{options[place].partition('=')[0]}={value}"
    else:
        names = ("folder", "first", "window", "prior", "protect", "keep", "recent", "sinks", "seed", "p", "shift")
        options.append(f"{chance.choice(names)}={value}")
    return f"{name}:{','.join(options)}"


def retype(chance, folder, file):
    """Change the shape, type or size of a tensor, or which there are."""
    file = file.with_suffix(".safetensors")
    tensors = load_file(file)
    if not tensors:
        tensors = {"importance": torch.ones(6)}
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]
    match chance.randrange(9):
        case 0 | 1:
            tensors[name] = tensor.to(chance.choice(DTYPES))
        case 2:
            tensors[name] = chance.choice((tensor[:0], tensor[:1], tensor[:-1], tensor[None], tensor.flatten()[0]))
        case 3:
            del tensors[name]
        case 4:
            tensors[f"{name}s"] = tensor
        case 5:
            tensors[name] = tensor.flip(0)
        case 6:
            tensors[name] = torch.full_like(tensor, chance.choice((0.0, -1.0, 1.0, 1e-30, 1e6, -1e6)))
        case _:
            tensors[name] = tensor.double() * chance.choice((0, -1, 1e3, 1e6, 1e20, 1e300, float("inf"), float("nan")))
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, file)


def sign_all(folder):
    """Let every checksum agree with what is there, inner ones first; whether that can be done."""
    inner = {}
    for header in sorted(folder.rglob("*.json"), key=lambda path: -len(path.parts)):
        name = header.stem
        sign(header.parent, name, **({"trained": {**inner}} if name == "policy" and inner else {}))
        inner[name] = json.loads(header.read_text())["checksum"]


def outcome(folder, wanted, signed):
    """Return how reading a spoilt folder ends; what is wrong with that begins with a capital."""
    signal.alarm(SECONDS)
    try:
        found = logits(folder)
    except AneeError as error:
        text = str(error)
        return "refused" if "\n" not in text and len(text) < 2000 else f"Unreadable message: {text[:500]!r}"
    except TimeoutError:
        return "Hangs"
    except BaseException as error:
        return f"Raises {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    if not found.isfinite().all():
        return "Gives logits that are not finite"
    if torch.equal(found, wanted):
        return "immaterial"
    return "signed anew, other finite logits" if signed else "Gives other logits"


def test_a_spoilt_policy_is_refused_or_the_same(saved, campaign, tmp_path):
    def ring(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    for seed in campaign.trials("saved policies, spoilt", short=200, long=5_000):
        chance = random.Random(seed)
        kind = chance.choice(sorted(saved))
        source, wanted = saved[kind]
        folder = tmp_path / str(seed)
        shutil.copytree(source, folder)
        file = chance.choice(sorted(folder.rglob("*.*")))
        how = chance.choice((damage, damage, replace, edit, edit, retype, retype))
        how(chance, folder, file)
        signed = how in (edit, retype) and chance.random() < 0.6
        if signed:
            sign_all(folder)
        end = outcome(folder, wanted, signed)
        if end[0].isupper():
            campaign.fault(f"seed {seed}, {kind}, {how.__name__} of {file.name}{', signed' * signed}: {end}")
        else:
            campaign.count(end)
            shutil.rmtree(folder)
    signal.signal(signal.SIGALRM, before)
