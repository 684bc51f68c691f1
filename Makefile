# make demo: fine-tune the shipped base with several adapters and print the table (at most 4 minutes on 2 CPU cores).
# make test: everything that CI runs. Both install into .venv first, once; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One process per core; the closing line of pytest is the last line of the output.
PYTEST ?= $(BIN)/python -m pytest -n auto --maxprocesses 8 -q

.DEFAULT_GOAL := test
.PHONY: demo test lint clean

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[train,test]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m train.demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint
	$(PYTEST)

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .hypothesis
