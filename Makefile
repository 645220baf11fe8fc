# Two commands: `make reproduce` runs the main job, `make test` checks all but what takes long. Each sets up .venv first.
PYTHON ?= $(or $(shell command -v python3.11),python3)
export PIP_ARGS ?=
BIN := .venv/bin
# parameters given on the command line (PROFILE=laptop EPOCHS=20 …) go to the experiments
GIVEN = $(foreach v,$(filter-out PIP_ARGS PYTHON MAKEOVERRIDES MAKEFLAGS,$(.VARIABLES)),$(if $(findstring command line,$(origin $v)),'$v=$($v)'))

.PHONY: setup reproduce test test-slow lab docs readme clean
setup: .venv/.ready

.venv/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt setuptools wheel
	$(BIN)/pip install -q --disable-pip-version-check $(PIP_ARGS) --no-build-isolation -c constraints.txt -e '.[dev]'
	touch $@

reproduce: setup
	$(BIN)/xxact reproduce $(GIVEN)

test: setup
	$(BIN)/ruff check
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2
	$(BIN)/pytest -m 'not slow'

test-slow: setup
	$(BIN)/pytest -m slow

lab: setup
	$(BIN)/jupyter lab nbs

docs: setup
	$(BIN)/xxact docs

readme: setup
	$(BIN)/xxact readme

clean:
	rm -rf .venv runs figures/smoke data/*-[0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f].parquet data/*-[0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f].rejects.parquet
