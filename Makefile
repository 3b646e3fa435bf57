# make demo: the whole pipeline here, in minutes on two cores. Run again, it goes on or is done.
# make test: the tests. make gpu-check: ten minutes on one GPU, before a long run on several.
# Each of them sets itself up first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test gpu-check
.DELETE_ON_ERROR:
.SECONDARY:
.SECONDEXPANSION:

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

data/local/meta.json: | .venv/installed
	$(BIN)/python prepare_data.py local

out/%/trained: | data/local/meta.json
	$(BIN)/python train.py config/$*.py --init_from=resume
	touch $@

# a target for each set of rules, so that both cores have work
READ := out/baseline_demo/read_adamw out/maml_demo/read_none+own+safe
READ += out/baseline_demo/read_none+dynamic

$(READ): $$(@D)/trained
	$(BIN)/python adapt.py $(@D) --passages 4 --rules $(subst +, ,$(@F:read_%=%))
	touch $@

demo: .venv/installed data/local/meta.json
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs=2 $(READ)  # a core each
	$(BIN)/python adapt.py out/maml_demo --text README.md --rules none safe --max_new_tokens 200
	$(BIN)/python plot.py out/baseline_demo out/maml_demo -o out/curves.png

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

gpu-check: .venv/installed
	$(BIN)/python -m pytest -x -s -m gpu
	$(BIN)/python bench.py config/maml_124m.py
