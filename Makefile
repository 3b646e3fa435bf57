# make demo: the whole pipeline here, in eight minutes on two cores. Run again, it goes on or is done.
# make test: the tests. make gpu-check: ten minutes on one GPU, before a long run on several.
# Each of them sets itself up first.
PYTHON ?= python3
BIN := .venv/bin
RUNS := longer_demo rates_demo maml_demo
CONFIG = config/$*.py
RULES = none own

.PHONY: demo test gpu-check
.DELETE_ON_ERROR:
.SECONDARY:

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

data/local/meta.json: | .venv/installed
	$(BIN)/python prepare_data.py local

out/%/trained: | data/local/meta.json
	$(BIN)/python train.py $(CONFIG) --init_from=resume
	touch $@

out/rates_demo/trained out/maml_demo/trained: out/baseline_demo/trained

# the baseline with as many tokens as the two others have in all
out/longer_demo/trained: CONFIG = config/baseline_demo.py --max_steps=3024 --out_dir=out/longer_demo
out/longer_demo/read: RULES = none adamw

out/%/read: out/%/trained
	$(BIN)/python adapt.py out/$* --passages 8 --rules $(RULES)
	touch $@

demo: .venv/installed data/local/meta.json
	@$(MAKE) --no-print-directory out/baseline_demo/trained
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs=2 $(RUNS:%=out/%/read)  # a core each
	$(BIN)/python plot.py $(RUNS:%=out/%) -o out/curves.png

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

gpu-check: .venv/installed
	$(BIN)/python -m pytest -x -s -m gpu
	$(BIN)/python bench.py config/maml_124m.py
