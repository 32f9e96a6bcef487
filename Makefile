# make quickstart · make lint · make test · make test-kernels · make test-lens · make test-faults
# make test-clients · make study-toy, -text, -positions, -gqa · make gpu · make venv
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart lint test test-kernels test-lens test-faults test-clients gpu venv

quickstart: .venv/installed
	$(BIN)/python train.py configs/quickstart.yaml
	@echo
	$(BIN)/python sample.py runs/quickstart "def " --max-tokens 120 --slide
	@echo
	@echo "see heads     $(BIN)/python heads.py runs/quickstart"
	@echo "sample more   $(BIN)/python sample.py runs/quickstart \"class \" -n 3 --max-tokens 40"
	@echo "train longer  $(BIN)/python train.py runs/quickstart train.steps=4600"

# Style and 100 columns, types, and which package may import which.
lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

# Three workers on two cores: many tests wait for other processes.
test: .venv/installed
	$(BIN)/python -m pytest -n 3 --dist worksteal

# Every shape and mask in Triton's interpreter, every tile compiled for every target: half an hour
# on two cores. One test takes much of it, so the time limit is longer.
test-kernels: .venv/installed
	PYTEST_TIMEOUT=7200 $(BIN)/python -m pytest -n 2 -m grid

# Patterns, scores and ablations compared with TransformerLens, in a separate environment.
test-lens: .venv-lens/installed
	HF_HUB_OFFLINE=1 .venv-lens/bin/python -m pytest -m lens tests/test_transformer_lens.py

# Every fault: killed processes, full disks, damaged files. Ten minutes on two idle cores. Writes
# docs/reliability.md.
test-faults: .venv/installed
	$(BIN)/python -m pytest -n 2 -m "faults or not faults" tests/faults tests/test_distributed.py \
		--reliability docs/reliability.md

# Other programs open our checkpoints, each in its own environment: tests/clients/README.md. Some
# gigabytes; the first time, half an hour on two cores. Rewrites the table in docs/import.md.
CLIENTS ?= $(patsubst tests/clients/requirements/%.txt,%,$(wildcard tests/clients/requirements/*))
test-clients: .venv/installed $(CLIENTS:%=.venv-clients/%/installed)
	PYTHONPATH=.:tests $(BIN)/python tests/clients/run.py $(CLIENTS) \
		$(if $(SHAPES),--shapes $(SHAPES))

# Every test and timing on a GPU, in nine minutes, with .venv or else the machine's own Python.
# Without a GPU it lists the steps.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m bench.gpu

# Trains the runs of a study and rewrites its page in docs/studies: 15 to 25 minutes on two cores.
study-%: .venv/installed
	$(BIN)/python -m bench.study $*

venv: .venv/installed

.venv/installed: requirements.txt
.venv-lens/installed: requirements-lens.txt requirements.txt

# Creates the environment if it is missing or broken, and installs again if the pins have changed.
.venv/installed .venv-lens/installed:
	@$(@D)/bin/python -c "" 2>/dev/null || $(PYTHON) -m venv --clear $(@D)
	@echo "installing the pinned $< into $(@D) (a minute or two)"
	@$(@D)/bin/python -m pip install --disable-pip-version-check -q -r $<
	@touch $@

# The environment of a client: by uv if it is there, because it stores a package only once.
# vllm names packages that exist only for CUDA, so its file leaves them out.
.venv-clients/vllm/installed: NO_DEPS := --no-deps
.venv-clients/%/installed: tests/clients/requirements/%.txt
	@echo "installing the pinned $< into $(@D)"
	@if command -v uv >/dev/null; \
		then uv venv -q --clear --python $(PYTHON) $(@D); \
			uv pip install -q --python $(@D)/bin/python $(NO_DEPS) -r $<; \
		else $(PYTHON) -m venv --clear $(@D); \
			$(@D)/bin/python -m pip install --disable-pip-version-check -q $(NO_DEPS) -r $<; fi
	@touch $@
