"""Several at once, on what only one may write: each finds what one alone would have made."""

import shutil
import threading

import torch
from safetensors.torch import load_file
from tiny import adaptive, build

from anee_core.bench.records import Records
from anee_core.calibration.gate import fitted_for
from anee_core.files import only_one


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
