# make demo: the whole pipeline here, in four minutes on two cores. make test: the tests. Both set themselves up first.
# make compare: the README's comparison for one seed; DATASET=corpus for your own text, prepared as data/corpus, and
# FLAGS="--dtype=bfloat16 --compile=True" on a CPU that multiplies bfloat16 in hardware.
PYTHON ?= python3
DATASET ?= local
BIN := .venv/bin

.PHONY: demo compare compare_baseline compare_maml test
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
	@mkdir -p out && echo "two runs side by side, a core each; to watch them, tail -f out/compare_*.txt"
	@$(MAKE) --no-print-directory --jobs=2 compare_baseline compare_maml
	$(BIN)/python plot.py out/compare_baseline out/compare_maml -o out/compare.png

compare_baseline compare_maml: export OMP_NUM_THREADS = 1
compare_baseline compare_maml:
	@{ $(BIN)/python train.py config/$(@:compare_%=%)_corpus.py --dataset=$(DATASET) --out_dir=out/$@ $(FLAGS) && \
	  $(BIN)/python adapt.py out/$@ --draws 2 --lr 3e-4 6e-4 1.2e-3 2.4e-3; } > out/$@.txt 2>&1 || { tail -n 3 out/$@.txt; exit 1; }

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest
