"""The distributions as users get them: built as wheels, installed into a clean environment, used from there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import distribution
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, NanoChatConfig

from anee_core.conformance.suite import ADAPTER_CHECKS

pytestmark = pytest.mark.real  # a wheel and an environment for each distribution

ROOT = Path(__file__).parents[2]
PLUGINS = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
OWN = ("anee", "__editable__", "torchao")  # torchao slows each start by seconds and is not needed
TINY = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


def build(source: Path, wheels: Path) -> None:
    """Build the wheel of a distribution, from a copy: building leaves things behind."""
    copy = wheels.parent / f"source-{source.name}"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "plugins", "tests")
    shutil.copytree(source, copy, ignore=ignored)
    # What pip calls for each, in processes of its own.
    call = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", call, str(wheels)], cwd=copy, check=True, capture_output=True, text=True)


class Environment:
    """A virtual environment with the given wheels, and the third-party packages of this one."""

    def __init__(self, folder: Path, wheels: Path, packages: list[str]) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.folder, self.bin = folder, folder / ("Scripts" if os.name == "nt" else "bin")
        site = next(folder.glob("lib/python*/site-packages"))
        others = folder / "others"
        others.mkdir()
        for entry in Path(str(distribution("torch").locate_file(""))).iterdir():
            if not entry.name.startswith(OWN):
                (others / entry.name).symlink_to(entry)
        (site / "others.pth").write_text(f"{others}\n")
        files = [str(next(wheels.glob(f"{name.replace('-', '_')}-*.whl"))) for name in packages]
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(self.bin / "python"),
            "install",
            "-q",
            "--no-deps",
            "--no-index",
        ]
        subprocess.run([*pip, *files], check=True, capture_output=True, text=True)

    def run(self, *command: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment, outside the repository."""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [str(self.bin / str(command[0])), *map(str, command[1:])],
            cwd=self.folder,
            env={**environment, "COLUMNS": "200"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """The wheels of ANEE and of everything in plugins/."""
    folder = tmp_path_factory.mktemp("wheels") / "wheels"
    for source in (ROOT, *PLUGINS):
        build(source, folder)
    return folder


@pytest.fixture(scope="session")
def environment(wheels, tmp_path_factory):
    """An environment with ANEE and all plugins of the repository."""
    names = ["anee", *(source.name for source in PLUGINS)]
    return Environment(tmp_path_factory.mktemp("clean") / "env", wheels, names)


@pytest.fixture(scope="session")
def nanochat(tmp_path_factory):
    """A tiny nanochat on disk: a family that ANEE itself has no adapter for."""
    folder = tmp_path_factory.mktemp("nanochat")
    config = NanoChatConfig(**TINY, final_logit_softcapping=2.0, eos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_plugins_are_listed_with_what_they_provide(environment):
    done = environment.run("anee", "plugins", "--json")
    found = {plugin["distribution"]: plugin for plugin in json.loads(done.stdout)}
    assert set(found) == {"anee", *(source.name for source in PLUGINS)}
    assert found["anee-nanochat"]["provides"] == {"adapters": ["nanochat"]}
    assert found["anee-staggered"]["provides"] == {"controllers": ["staggered"]}
    assert found["anee-strided"]["provides"] == {"cache_policies": ["strided"]}
    assert found["anee-smollm2"]["provides"] == {
        "model_sources": ["smollm2", "smollm2-asa"],
        "trained_policies": [
            *(f"smollm2-135m-instruct/{name}" for name in ("asa", "gate", "shortcuts")),
            "smollm2-135m-instruct-asa/asa",
        ],
    }
    assert found["anee-mini"]["provides"] == {
        "model_sources": ["mini"],
        "trained_policies": [f"anee-mini-1/{name}" for name in ("asa", "gate", "shortcuts")],
    }
    assert not any(plugin["problem"] for plugin in found.values())


def test_the_mini_model_is_whole_in_its_wheel(environment):
    done = environment.run("anee", "generate", "mini", "The old man", "--policy", "rl+asa", "-n", "4", "--json")
    assert json.loads(done.stdout)["text"].startswith("The old man")


def test_policies_and_adapter_of_plugins_work_together_and_the_fast_step_is_compiled(environment, nanochat):
    """In one process, for importing torch takes seconds."""
    script = f"""
        import torch, anee, anee_core
        from transformers import AutoModelForCausalLM, LlamaConfig
        assert {str(environment.folder)!r} in anee.__file__ and {str(environment.folder)!r} in anee_core.__file__
        ids = torch.arange(3, 40)[None]
        model = anee.load({str(nanochat)!r}, policy="staggered:share=0.5,protect=1 1+strided:every=4,recent=8")
        whole = model(ids)
        cache, steps = model.new_cache(), []
        for t in range(ids.shape[1]):
            steps.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
        torch.testing.assert_close(whole.logits, torch.cat(steps, 1), atol=5e-5, rtol=1e-3)
        assert model.last_trace.kept.max() < 20
        print(model.generate(ids, max_new_tokens=5).shape[1])
        print(anee.load("mini").generate("The old man", max_new_tokens=4).text)
        model = anee.load(AutoModelForCausalLM.from_config(LlamaConfig(**{TINY!r})).eval())
        model.decode(ids[:, :3], max_new_tokens=2)
        print(model.slow_because)
    """
    shown = environment.run("python", "-c", textwrap.dedent(script)).stdout
    length, text, slow_because = shown.strip().splitlines()
    assert (length, slow_because) == ("42", "None")
    assert text.startswith("The old man")


def test_conformance_suite_is_in_the_wheel(environment):
    report = environment.folder / "report.json"
    done = environment.run(
        "anee", "conformance", "anee_nanochat:NanoChatAdapter", "-k", "paths", "-k", "skip", "--json", report
    )
    assert "2 of 2 checks passed" in done.stdout
    assert json.loads(report.read_text())["passed"]
    done = environment.run("python", "-m", "pytest", "-q", "--anee-adapter", "nanochat", "-k", "paths or refusal")
    assert "2 passed" in done.stdout


def test_a_new_adapter_passes_as_written(environment):
    environment.run("anee", "new-adapter", "jais2", "--output", "new")
    folder = environment.folder / "new" / "anee-jais2"
    done = environment.run("python", "-m", "pytest", "-q", "-c", folder / "pyproject.toml", "--rootdir", folder, folder,
                           "-o", f"pythonpath={folder}")  # fmt: skip
    assert f"{len(ADAPTER_CHECKS)} passed" in done.stdout


PROVIDER = """
    from anee_core.controllers.random import RandomController
    from anee_core.hookspecs import hookimpl

    @hookimpl
    def anee_controllers():
        return {"popular": RandomController}
"""


@pytest.fixture(scope="session")
def troubled(wheels, tmp_path_factory):
    """An environment with ANEE, a plugin that fails to import, and two that claim one name."""
    made = tmp_path_factory.mktemp("troubled") / "wheels"
    for name, code in (("broken", "import no_such_module"), ("first", PROVIDER), ("second", PROVIDER)):
        source = made.parent / f"anee-{name}"
        source.mkdir()
        (source / f"anee_{name}.py").write_text(textwrap.dedent(code))
        (source / "pyproject.toml").write_text(
            f'[build-system]\nrequires = ["setuptools>=77"]\nbuild-backend = "setuptools.build_meta"\n'
            f'[project]\nname = "anee-{name}"\nversion = "1.2"\n'
            f'[project.entry-points.anee]\n{name} = "anee_{name}"\n[tool.setuptools]\npy-modules = ["anee_{name}"]\n'
        )
        build(source, made)
    shutil.copy(next(wheels.glob("anee-*.whl")), made)
    return Environment(made.parent / "env", made, ["anee", "anee-broken", "anee-first", "anee-second"])


def test_broken_and_clashing_plugins_are_named_and_stop_nothing(troubled, llama_folder):
    """Three commands in one process, for importing torch takes seconds."""
    generate = ["anee", "generate", str(llama_folder), "Hello", "-n", "3", "--policy"]
    commands = [[*generate, "static:skip=1"], [*generate, "popular:p=0.5"], ["anee", "plugins"]]
    script = f"""
        import sys
        from anee.cli import main
        for command in {commands!r}:
            sys.argv = command
            try:
                main()
            except SystemExit as stop:
                print("code", stop.code or 0, file=sys.stderr, flush=True)
    """
    done = troubled.run("python", "-c", textwrap.dedent(script))
    generated, refused, listed = re.split(r"code \d\n", done.stderr.removesuffix("code 0\n"))
    assert "'broken' of anee-broken 1.2 is broken: ModuleNotFoundError: No module named 'no_such_module'" in listed
    for part in ("controller 'popular' is provided by", "'first' of anee-first 1.2", "'second' of anee-second 1.2"):
        assert part in listed
    assert "update or uninstall anee-broken" in generated
    assert "code 2\n" in done.stderr
    line = refused.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert "uninstall all but one" in line
    assert "anee-first" in line
    assert "anee-second" in line
