"""Several at once, on what only one may write: each finds what one alone would have made."""

import json
import shutil
import threading

import pytest
import torch
from processes import command, compiled, started
from safetensors.torch import load_file
from tiny import adaptive, build

from anee_core.bench.records import Records
from anee_core.calibration.gate import fitted_for
from anee_core.files import only_one
from anee_core.steps.native.build import library


def at_once(*works):
    """Run functions in threads that begin together, and raise what one of them raised."""
    together, errors = threading.Barrier(len(works)), []

    def run(work):
        together.wait()
        try:
            with torch.no_grad():
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def weights(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def test_first_uses_at_once_fit_what_one_alone_fits(caplog):
    folder = fitted_for(adaptive(build("gpt2")))
    alone = weights(folder)
    assert alone
    shutil.rmtree(folder)
    models, folders = [adaptive(build("gpt2")) for _ in range(3)], []
    at_once(*(lambda model=model: folders.append(fitted_for(model)) for model in models))
    assert len(folders) == 3
    assert len(set(folders)) == 1
    found = weights(folders[0])
    assert found.keys() == alone.keys()
    for name, tensors in found.items():
        assert all(torch.equal(tensor, alone[name][key]) for key, tensor in tensors.items()), name
    assert not (folders[0] / "work").exists()
    assert any("another process writes" in record.getMessage() for record in caplog.records)


def test_two_runs_into_one_file_lose_no_record(tmp_path):
    both = [Records(tmp_path / "out.json", {"model": "tiny"}) for _ in range(2)]

    def work(records, run):
        for i in range(20):
            records.add(f"{run} {i}", {"run": run, "i": i})

    at_once(*(lambda records=records, run=run: work(records, run) for run, records in enumerate(both)))
    assert len(Records(tmp_path / "out.json", {"model": "tiny"}).all()) == 40


def test_where_no_lock_can_be_made_work_goes_on(tmp_path):
    (tmp_path / "file").touch()
    done = []
    with only_one(tmp_path / "file" / "below"):
        done.append(True)
    assert done


COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo 1; exit; fi
echo compiled >> {log}
for last; do :; done
head -c 5000 {library} > "$last"; sleep 0.3; cp {library} "$last"
"""
"""A compiler that only copies, and takes its time."""


@pytest.fixture
def kinds(llama_folder, text):
    """What several processes may begin at once: the work of each by its number, and what they leave in a folder."""
    fit = command("generate", llama_folder, "Hello", "-n", 3, "-p", "rl", "-b", 0.9)
    sizes = ("--no-baselines", "-b", "0.8,0.9", "--length", 24, "--blocks", 2, "--repeats", 0)
    policies = ("knorm", "tova", "window", "random_tokens")

    def sweep(number, place):
        out = place / "out"
        return command(
            "sweep", llama_folder, "-p", f"{policies[number]}:keep={{budget}}", "-t", f"a={text}", "-o", out, *sizes
        )

    def records(place):
        found = json.loads((place / "out.json").read_text())["records"]
        return dict(sorted(found.items()))

    def fitted(place):
        return [path.read_bytes() for path in sorted(place.glob("cache/gate-*/*.safetensors"))]

    def libraries(place):
        return [path.read_bytes() for path in place.glob("cache/native/*.so")], (place / "compilations").read_text()

    return {
        "compile": (lambda number, place: compiled, libraries),
        "fit": (lambda number, place: fit, fitted),
        "sweep": (sweep, records),
    }


def test_processes_at_once_leave_what_one_after_the_other_leaves(campaign, kinds, make_cache, tmp_path):
    for seed in campaign.trials("processes at once", short=1, long=12):
        name, count = list(kinds)[seed % 3], 2 + seed // 3 % 3
        work, left = kinds[name]
        ends = {}
        for way in ("in-turn", "at-once"):
            place = tmp_path / f"{seed}-{way}"
            place.mkdir()
            environment = {"ANEE_CACHE": str(place / "cache")}
            if name == "compile":
                compiler = place / "compiler"
                compiler.write_text(COMPILER.format(log=place / "compilations", library=library()._name))
                compiler.chmod(0o700)
                environment["CXX"] = str(compiler)
            else:
                make_cache().rename(place / "cache")
            running = []
            for number in range(count):
                running.append(started(work(number, place), place / f"log-{number}", **environment))
                if way == "in-turn":
                    running[-1].join()
            for number, process in enumerate(running):
                process.join()
                said = (place / f"log-{number}").read_text()
                if process.exitcode != 0 or "Traceback" in said:
                    campaign.fault(f"{name}, seed {seed}, {way}: ended with {process.exitcode}: {said[-600:]}")
            ends[way] = left(place)
        campaign.count(name)
        if ends["at-once"] != ends["in-turn"]:
            campaign.fault(f"{name}, seed {seed}: {count} processes left something else")
