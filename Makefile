# make demo: everything from a fresh clone to a trained and evaluated model.  make test: everything that must hold.
# make kernels: every kernel compiled for Hopper, by the Triton of constraints.txt and by an older one that GPU images carry.
# make docs: API pages from docstrings, in build/api/.
PYTHON ?= python3
BIN := .venv/bin
DATA := data/prepared

OLDER_TRITON := 3.6.0

.PHONY: demo test kernels docs setup data clean

demo: data
	@$(BIN)/python tools/demo.py

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

kernels: setup .venv/triton-$(OLDER_TRITON)
	@mkdir -p build
	$(BIN)/python tools/kernel_report.py --targets sm_90 --output build/kernels.json >build/kernels.txt
	PYTHONPATH=.venv/triton-$(OLDER_TRITON) $(BIN)/python tools/kernel_report.py --targets sm_90 \
		--output build/kernels-$(OLDER_TRITON).json >build/kernels-$(OLDER_TRITON).txt

docs: setup
	$(BIN)/python docs/build_api.py

setup: .venv/ready

data: $(DATA)/demo-valid/manifest.json

.venv/ready: pyproject.toml kernels/pyproject.toml constraints.txt
	@echo "installing into .venv: a few minutes the first time; 2.5 GB, 5 GB where PyTorch comes with CUDA"
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("lcpt needs Python 3.10 or newer: make PYTHON=python3.11")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ./kernels -e '.[test,docs]'
	@touch $@

.venv/triton-$(OLDER_TRITON): | setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$(OLDER_TRITON)

$(DATA)/demo-train/manifest.json: data/sample/train.jsonl.xz | setup
	@rm -rf $(@D) && $(BIN)/python tools/prepare_data.py --input $< --output $(@D) --vocab-size 4096 --workers 2

$(DATA)/demo-valid/manifest.json: data/sample/valid.jsonl.xz $(DATA)/demo-train/manifest.json | setup
	@rm -rf $(@D) && $(BIN)/python tools/prepare_data.py --input $< --output $(@D) --tokenizer $(DATA)/demo-train/tokenizer.model

clean:
	rm -rf .venv $(DATA) runs/demo
