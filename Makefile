# make demo: the whole pipeline on this machine, in about five minutes. make test: the tests. Each sets itself up first.
# make compare: the smallest run of the README's comparison; DATASET=corpus for your own, prepared as data/corpus.
PYTHON ?= python3
DATASET ?= local
BIN := .venv/bin

.PHONY: demo compare test
.DELETE_ON_ERROR:

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

data/%/meta.json: | .venv/installed
	$(BIN)/python prepare_data.py $*

demo: .venv/installed data/local/meta.json
	$(BIN)/python train.py config/baseline_demo.py
	$(BIN)/python train.py config/maml_demo.py
	$(BIN)/python adapt.py out/baseline_demo --draws 2
	$(BIN)/python adapt.py out/maml_demo --draws 2
	$(BIN)/python plot.py out/baseline_demo out/maml_demo -o out/curves.png

compare: .venv/installed data/$(DATASET)/meta.json
	for method in baseline maml; do \
	  $(BIN)/python train.py config/$${method}_corpus.py --dataset=$(DATASET) --out_dir=out/compare_$$method --keep_interval=196 && \
	  $(BIN)/python adapt.py out/compare_$$method --draws 2 || exit 1; done
	$(BIN)/python plot.py out/compare_baseline out/compare_maml -o out/compare.png

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest
