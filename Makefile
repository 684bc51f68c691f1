# make demo: fine-tune the shipped base with several adapters and print the table (at most 4 minutes on 2 CPU cores).
# make test: lint, types, doctests, test suite. Both install into .venv first, once; PYTHON chooses the interpreter.
# make experiments: every experiment of train/experiments into benchmarks/results, or one: EXPERIMENT=boha_target. Parts
#   that the results hold already are not run again (ARGS=--fresh runs them too); each file of results says how many
#   seconds its parts took.
# make notebooks: runs the notebooks and keeps their outputs in them, or one: NOTEBOOK=notebooks/tour.ipynb.
# make test-flax: Hugging Face's own Flax models, gone from transformers 5, in a second environment. CI runs both tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FLAX_VENV := .venv-flax
FLAX_STAMP := $(FLAX_VENV)/.installed
# One process per core; the closing line of pytest is the last line of the output.
PYTEST_OPTIONS := -n auto --maxprocesses 8 -q
EXPERIMENT ?= digits reconstruction boha_target hira_ablations sequential glue sequential_glue
PYTEST ?= $(BIN)/python -m pytest $(PYTEST_OPTIONS)

.DEFAULT_GOAL := test
.PHONY: demo experiments notebooks test test-flax lint clean

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): some minutes, 2.3 GiB"
	$(BIN)/python -m pip install --quiet --editable '.[train,experiments,test]'
	touch $(STAMP)

$(FLAX_STAMP): pyproject.toml
	test -x $(FLAX_VENV)/bin/python || $(PYTHON) -m venv $(FLAX_VENV)
	$(FLAX_VENV)/bin/python -m pip install --quiet --editable '.[test-flax]'
	touch $(FLAX_STAMP)

demo: $(STAMP)
	$(BIN)/python -m train.demo

experiments: $(STAMP)
	set -e; for name in $(EXPERIMENT); do $(BIN)/python -m train.experiments.$$name $(ARGS); done

notebooks: $(STAMP)
	$(BIN)/python -m notebooks.execute $(NOTEBOOK)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint
	$(PYTEST)

test-flax: $(FLAX_STAMP)
	$(FLAX_VENV)/bin/python -m pytest $(PYTEST_OPTIONS) tests_flax

clean:
	rm -rf $(VENV) $(FLAX_VENV) runs build dist .pytest_cache .ruff_cache .hypothesis
