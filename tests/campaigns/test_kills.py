"""Long commands, killed at any moment and given again, end in what they make undisturbed, bit for bit."""

import os
import random
import signal
import time

import pytest
from processes import command, started

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
COMMANDS = {
    "calibrate": "calibrate MODEL -f PLACE --sequences 32 --length 48 --rank 4",
    "sweep": "sweep MODEL -p knorm:keep={budget} -t a=TEXT -o PLACE/out -b 0.8,0.9 --length 24 --blocks 2 --repeats 0",
    "asa": "train asa MODEL -t TEXT -f PLACE --steps 6 --save-every 1 --validate-every 2 --length 32",
    "supervised": "train supervised MODEL -t TEXT -f PLACE --steps 4 --save-every 1 --validate-every 2 --length 32 "
    "--rank 8 --calibration-sequences 8",
    "rl": "train rl MODEL -t TEXT -f PLACE --steps 2 --save-every 1 --validate-every 2 --length 32 --rank 8 "
    "--calibration-sequences 8 --reinforce-steps 3 --samples 4",
}
"""Quick ones of every kind, those first that the short form tries."""


@pytest.fixture
def job(llama_folder, text):
    """Return a function that makes the work of a command, whose output goes to a place."""

    def of(name, place):
        words = COMMANDS[name].replace("MODEL", str(llama_folder)).replace("TEXT", str(text))
        return command(*words.replace("PLACE", str(place)).split())

    return of


def results(place):
    """Return what a command made: its result files, and the weights of its last checkpoint."""
    files = [*place.glob("*.json"), *place.glob("*.safetensors"), *place.glob("**/checkpoint/trained.safetensors")]
    return {str(path.relative_to(place)): path.read_bytes() for path in files}


def test_killed_commands_go_on_to_the_same_end(campaign, job, tmp_path):
    whole, seconds = {}, {}
    for seed in campaign.trials("killed commands, given again", short=1, long=60):
        name = list(COMMANDS)[seed % len(COMMANDS)]
        if name not in whole:
            began = time.monotonic()
            alone = started(job(name, tmp_path / name), tmp_path / "log")
            alone.join()
            assert alone.exitcode == 0, (tmp_path / "log").read_text()
            whole[name], seconds[name] = results(tmp_path / name), time.monotonic() - began
        chance, place = random.Random(seed), tmp_path / f"{name}-{seed}"
        place.mkdir()
        number, log = SIGNALS[seed % 3], tmp_path / f"log-{seed}"
        process = started(job(name, place), log)
        process.join(chance.uniform(0.05, 0.85 * seconds[name]))
        if process.exitcode is None:
            os.kill(process.pid, number)
        process.join()
        said, trial = log.read_text(), f"{name}, seed {seed}, signal {number}"
        campaign.count("done before" if process.exitcode == 0 else f"stopped {name}")
        if "Traceback" in said or process.exitcode not in (0, -number, 128 + number, 130):
            campaign.fault(f"{trial}: ended with {process.exitcode}: {said[-600:]}")
        again = started(job(name, place), log)
        again.join()
        found = results(place)
        if again.exitcode != 0:
            campaign.fault(f"{trial}: cannot go on: {log.read_text()[-600:]}")
        elif found != whole[name]:
            differing = sorted(k for k in found.keys() | whole[name] if found.get(k) != whole[name].get(k))
            campaign.fault(f"{trial}: {differing} differ")
