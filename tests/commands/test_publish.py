"""A published policy is a folder that loads, and a card that says what was measured."""

import shutil

import pytest
import torch
import yaml

import anee
from anee_core.cache_policies.asa import AsaWeights
from anee_core.errors import CheckpointError, InputError, PolicyError
from anee_core.evaluation import text_blocks, text_quality
from anee_core.policy import hub


@pytest.fixture
def asa(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 4, 4, 32, generator=generator)
    AsaWeights(weights[0], weights[1], torch.zeros(4)).save(tmp_path / "asa")
    return tmp_path / "asa"


def test_a_folder_holds_policy_weights_and_card(llama_folder, asa, text, tmp_path, run_anee):
    out = tmp_path / "out"
    options = ["--policy", f"random:protect=1 1+asa:{asa}", "--budget", "0.8", "--text", f"nights={text}"]
    done = run_anee("publish", llama_folder, "--to", out, *options, "--length", "48", "--blocks", "2")
    assert done.code == 0, done.err
    shutil.rmtree(asa)
    model = anee.load(llama_folder, policy=out)
    assert model.budget == 0.8
    quality = text_quality(model, text_blocks(model, text, 48, 2))
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "anee"
    assert f"# random:protect=1 1+asa:{asa.name} for {llama_folder.name}" in body
    assert f'policy="{out}"' in body
    row = next(line for line in body.splitlines() if line.startswith("| nights"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:3] == ["nights", "96", f"{quality.spent:.1%}"]
    assert cells[4:6] == [f"{quality.dropped:.1%}", f"{quality.perplexity:.2f}"]
    assert cells[6] == f"{text_quality(anee.load(llama_folder), text_blocks(model, text, 48, 2)).perplexity:.2f}"
    assert str(tmp_path) not in body.replace(f'policy="{out}"', "")


def test_a_repository_gets_the_folder_and_gives_it_back(llama_folder, asa, tmp_path, run_anee, monkeypatch):
    kept = tmp_path / "hub"

    class Api:
        def create_repo(self, name, private, exist_ok):
            assert (name, private, exist_ok) == ("somebody/my-policy", True, True)
            return "https://hub/somebody/my-policy"

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, kept)

    monkeypatch.setattr(hub, "HfApi", Api)
    options = ["--policy", f"asa:{asa}", "--to", "somebody/my-policy", "--push", "--private"]
    done = run_anee("publish", llama_folder, *options)
    assert done.code == 0, done.err
    assert "https://hub/somebody/my-policy" in done.err
    assert 'policy="somebody/my-policy"' in (kept / "README.md").read_text()
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(kept)

    monkeypatch.setattr(hub, "snapshot_download", download)
    model = anee.load(llama_folder, policy="somebody/my-policy")
    ids = torch.randint(3, 97, (1, 20))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, anee.load(llama_folder, policy=f"asa:{asa}")(ids).logits)
    # A commit, a tag or a branch, wherever policy strings go.
    assert anee.load(llama_folder, policy="somebody/my-policy@v1.0").policy == model.policy
    generated = run_anee("generate", llama_folder, "a", "--policy", "somebody/my-policy@refs/pr/1", "-n", "1")
    assert generated.code == 0, generated.err
    assert asked == [("somebody/my-policy", revision) for revision in (None, "v1.0", "refs/pr/1")]


def test_what_cannot_be_done_says_so(llama_folder, run_anee, tmp_path):
    with pytest.raises(CheckpointError, match="no policy of that name can be had from the hub"):
        anee.load(llama_folder, policy="somebody/nothing-here")
    for name in ("somebody/name@", "somebody/name@a b", "@v1", "somebody@v1"):
        with pytest.raises(PolicyError, match="unknown policy"):
            anee.load(llama_folder, policy=name)
    with pytest.raises(InputError, match="OWNER/NAME"):
        hub.push(tmp_path, "no repository")
    with pytest.raises(CheckpointError, match="did not take the policy"):
        hub.push(tmp_path, "somebody/name")
    done = run_anee("publish", llama_folder, "--to", "folder", "--policy", "static:skip=1", "--push")
    assert "OWNER/NAME" in done.err
    done = run_anee("publish", llama_folder, "--to", tmp_path, "--policy", "static:skip=1", "--text", "file.txt")
    assert "a text is NAME=FILE" in done.err
