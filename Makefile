# make demo: the whole pipeline on this machine, in about five minutes. make test: the tests. Each sets itself up first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test
.DELETE_ON_ERROR:

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

data/local/meta.json: | .venv/installed
	$(BIN)/python prepare_data.py local

demo: .venv/installed data/local/meta.json
	$(BIN)/python train.py config/baseline_demo.py
	$(BIN)/python train.py config/maml_demo.py
	$(BIN)/python adapt.py out/baseline_demo --draws 2
	$(BIN)/python adapt.py out/maml_demo --draws 2
	$(BIN)/python plot.py out/baseline_demo out/maml_demo -o out/curves.png

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest
