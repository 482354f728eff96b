# make demo   a teacher, and students with few labels, alone and distilled, on scikit-learn's digits
# make figures   writes figures/ again, as recorded there: minutes; those of other data when named, as EXHIBITS=coco
# make check  ruff, pyright, notebooks in step with modules, the fast tests: under two minutes
# make test   everything that can be checked offline, with no data but what the repository and scikit-learn carry
# make test-oldest   the tests with the lowest versions that settings.ini allows, in .venv-oldest
# make coverage      which lines of the package the tests run
# make docs   a static site from the executed notebooks, in _docs/
# Each makes .venv first if it is not there; nothing but Python 3.10 or newer is needed.

PYTHON ?= python3
BIN := .venv/bin
RUN := PYTHONPATH=$(CURDIR) PATH="$(CURDIR)/$(BIN):$$PATH"
ALONE := env -u RCKA_DATA -u RCKA_RUNS OMP_NUM_THREADS=1

.PHONY: demo figures lint check test test-oldest coverage docs export clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# make/make/p' Makefile

# uv comes by pip into the environment itself, so that nothing outside .venv is touched; what is compiled now is not compiled by every process the tests start
.venv/.installed: settings.ini setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"Python 3.10 or newer is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install -q --disable-pip-version-check uv
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install -q --compile-bytecode -e '.[dev,docs]'
	@touch $@

demo: .venv/.installed
	@mkdir -p runs
	$(RUN) papermill --engine rcka --no-progress-bar --log-output -k python3 nbs/benchmarks/digits.ipynb runs/digits.ipynb
	@echo "The executed notebook is runs/digits.ipynb, the figure runs/figures/digits.png."

EXHIBITS ?= digits digits-resnet56 bounds analysis-digits ten-classes what-works
figures: .venv/.installed
	$(RUN) OMP_NUM_THREADS=1 python -m rcka.experiments.exhibits $(EXHIBITS)

lint: .venv/.installed
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) pyright
	@$(RUN) tests/notebooks_in_step

check: lint
	$(RUN) $(ALONE) pytest -q -n 2 -m "not slow and not real_data" tests

test: .venv/.installed
	@$(RUN) tests/notebooks_in_step
	$(RUN) $(ALONE) nbdev_test --n_workers 2 --timing --do_print
	$(RUN) $(ALONE) pytest -q -n 2 -m "not real_data" tests

test-oldest: OLDEST := .venv-oldest/bin
test-oldest: .venv/.installed
	@test -x $(OLDEST)/python || $(PYTHON) -m venv .venv-oldest
	VIRTUAL_ENV=$(CURDIR)/.venv-oldest $(BIN)/uv pip install -q --compile-bytecode --resolution lowest-direct -e '.[dev]'
	PYTHONPATH=$(CURDIR) PATH="$(CURDIR)/$(OLDEST):$$PATH" $(ALONE) pytest -q -n 2 -m "not real_data" tests

coverage: .venv/.installed
	$(RUN) $(ALONE) pytest -q -n 2 -m "not slow and not real_data" --cov rcka --cov-report term:skip-covered tests

docs: .venv/.installed
	$(RUN) docs/build

# after a change to a notebook
export: .venv/.installed
	$(RUN) nbdev_export
	$(RUN) nbdev_clean

clean:
	rm -rf _docs _docs.tmp build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
