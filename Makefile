# make demo   a teacher, and students with few labels, alone and distilled, on scikit-learn's digits
# make figures   writes figures/ again, as recorded there: minutes; those of other data when named, as EXHIBITS=coco
# make test   everything that can be checked offline
# make docs   a static site from the executed notebooks, in _docs/
# Each makes .venv first if it is not there; nothing but Python 3.10 or newer is needed.

PYTHON ?= python3
BIN := .venv/bin
RUN := PYTHONPATH=$(CURDIR) PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: demo figures test docs export clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

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

EXHIBITS ?= digits digits-resnet56 bounds analysis-digits what-works
figures: .venv/.installed
	$(RUN) OMP_NUM_THREADS=1 python -m rcka.exhibits $(EXHIBITS)

test: .venv/.installed
	@$(RUN) tests/notebooks_in_step
	$(RUN) OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --timing --do_print
	$(RUN) OMP_NUM_THREADS=1 pytest -q -n 2 tests

docs: .venv/.installed
	$(RUN) docs/build

# after a change to a notebook
export: .venv/.installed
	$(RUN) nbdev_export
	$(RUN) nbdev_clean

clean:
	rm -rf _docs _docs.tmp build dist *.egg-info .pytest_cache .hypothesis
