# make demo: train, evaluate and predict on real images; make test: the suite; make lint: ruff and mypy;
# make docs: the site, in build/site; make install: only the environment. Each makes the virtual environment .venv first,
# if it is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := check,digits,plot,dev

.PHONY: install demo test lint docs test-oldest constraints dist clean

install: $(VENV)/ready

demo: install
	$(BIN)/localvit demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/python docs/make_site.py

$(VENV)/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS),docs]"
	touch $@

# The suite on the oldest versions that pyproject.toml claims.
test-oldest: .venv-oldest/ready
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist worksteal

.venv-oldest/ready: constraints-oldest.txt pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[$(EXTRAS)]"
	touch $@

constraints: install
	(head -n 1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//') > constraints.new
	mv constraints.new constraints.txt

# The source distribution and the wheel.
dist: install
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) .venv-oldest build dist runs
