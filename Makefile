# make quickstart    a first result, in an environment of its own (.venv)
# make test          all that a change must pass
#
# PYTHON picks the interpreter (3.11 or later); TORCH picks the build of torch, as an argument of pip:
#     make test TORCH=torch==2.13.0

PYTHON ?= python3
TORCH ?= torch
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: .venv quickstart test lint smoke format clean

quickstart: .venv
	$(BIN)/ess-rl quickstart

# Files of tests go to so many processes, each of some 600 MiB.
WORKERS ?= 2

# The type checker uses one core, so the smoke runs go beside it.
test: .venv .venv/.ray
	$(MAKE) -j 2 lint smoke
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

# The whole chain as users walk it: runs, report, study. About a minute.
smoke: .venv
	folder=$$(mktemp -d) && \
	$(BIN)/ess-rl benchmark smoke --out $$folder/suite --jobs 2 && $(BIN)/ess-rl report $$folder/suite && \
	$(BIN)/ess-rl study family --quick --out $$folder/study --jobs 2 && \
	rm -r $$folder

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: .venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv: $(STAMP)

# torch comes first and alone, so that the second line finds the build that was asked for and keeps it. EnvPool has no
# wheel for some platforms, and building it from source takes far more than pip: there everything works without it.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ess-rl needs Python 3.11 or later: make PYTHON=...")'
	@echo "Installing ess-rl and $(TORCH) into .venv (once; minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(PIP) '$(TORCH)'
	@$(PIP) --only-binary envpool --editable '.[envpool,video,dev]' || { \
		$(PIP) --editable '.[video,dev]' && \
		echo "EnvPool could not be installed (why: pip's lines above). Gymnasium steps the MuJoCo tasks instead, more slowly."; }
	@touch $@

# For the tests of many machines alone: a quarter of a GB. Without it they are skipped.
.venv/.ray: $(STAMP)
	@$(PIP) --only-binary ray --editable '.[ray]' || \
		echo "Ray could not be installed (why: pip's lines above): the test of --on ray is skipped."
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
