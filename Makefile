# `make demo` and `make test` do everything, installation included, on a machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := outputs
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal  # a worker takes about 1.5 GiB

# A model that is named may have to be fetched.
export HF_HUB_OFFLINE ?= $(if $(FOODEXTRACT_MODEL)$(FOODEXTRACT_BASE),0,1)
export TOKENIZERS_PARALLELISM ?= false
export TRANSFORMERS_VERBOSITY ?= error
export TQDM_MININTERVAL ?= 5

.DEFAULT_GOAL := help
.PHONY: help install demo experiments space test test-slow test-floors docs-check lint lock refresh tiny-base clean

help:  ## Show what can be made.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## Create .venv from the lock in requirements.txt (once).

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 …"; exit 1; }
	@echo "installing into $(VENV) (a minute or two, once) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt -e .
	@touch $@

$(VENV)/floors/.installed: requirements.txt requirements-floors.txt $(VENV)/.installed
	@echo "installing the oldest supported versions into $(VENV)/floors (once) …"
	@$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(VENV)/floors
	@$(BIN)/uv pip install --quiet --python $(VENV)/floors/bin/python -r requirements.txt --override requirements-floors.txt -e .
	@touch $@

$(VENV)/checkov/.installed: deploy/requirements-checkov.txt $(VENV)/.installed
	@echo "installing the policy linter into $(VENV)/checkov (once) …"
	@$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(VENV)/checkov
	@$(BIN)/uv pip install --quiet --python $(VENV)/checkov/bin/python -r $<
	@touch $@

$(VENV)/ray/.installed: deploy/ray/requirements.txt requirements.txt $(VENV)/.installed
	@echo "installing Ray into $(VENV)/ray (once) …"
	@{ $(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(VENV)/ray && \
		$(BIN)/uv pip install --quiet --python $(VENV)/ray/bin/python -r $< -c requirements.txt && touch $@; } \
		|| echo "Ray cannot be installed: the tests that start it are skipped"

# The Hub that things are published to is one on this machine, which ends with the notebook.
demo: install  ## The whole story on the offline profile: draw, train in two stages, measure, publish, extract.
	@mkdir -p $(OUT)/notebooks
	FOODEXTRACT_PROFILE=offline FOODEXTRACT_PUSH_DATASET_TO_HUB=somebody/FoodExtract-images $(BIN)/python tests/hub_server.py \
		$(BIN)/papermill --no-progress-bar --log-output 00_create_vlm_dataset.ipynb $(OUT)/notebooks/00_create_vlm_dataset.ipynb
	FOODEXTRACT_PROFILE=offline FOODEXTRACT_COMMAND="make demo" FOODEXTRACT_PUSH_TO_HUB=somebody/FoodExtract-tiny \
		FOODEXTRACT_PUSH_SPACE_TO_HUB=somebody/FoodExtract-demo $(BIN)/python tests/hub_server.py $(BIN)/papermill --no-progress-bar --log-output \
		01_fine_tune_vlm_v3_smolVLM_500m.ipynb $(OUT)/notebooks/01_fine_tune_vlm_v3_smolVLM_500m.ipynb
	@$(BIN)/python tools/pages.py
	@$(BIN)/foodextract draw $(OUT)/examples --seed 5 --count 3
	@$(BIN)/foodextract extract $(OUT)/examples --model $(OUT)/offline/stage2
	@$(BIN)/python tools/examples.py
	@echo "notebooks with outputs: $(OUT)/notebooks   tuned model: $(OUT)/offline/stage2   figures: results/offline.json"

space: install  ## Start the Gradio demo on this machine: http://127.0.0.1:7860
	$(BIN)/python demos/FoodExtract-Vision/app.py

experiments: install  ## The four archived recipes on the offline profile, each a notebook; figures go to results/experiments.json.
	@mkdir -p $(OUT)/experiments
	@for notebook in experiments/*.ipynb; do \
		FOODEXTRACT_PROFILE=offline FOODEXTRACT_COMMAND="make experiments" $(BIN)/papermill --no-progress-bar --log-output --cwd experiments \
			$$notebook $(OUT)/experiments/$$(basename $$notebook) || exit 1; done
	@$(BIN)/python tools/pages.py
	@echo "notebooks with outputs: $(OUT)/experiments   figures: results/experiments.json"

test: lint  ## Lint, then the fast tests: units, one notebook from top to bottom, one pass through the demo in a browser.
	$(PYTEST) -m "not slow and not docs"

test-slow: install $(VENV)/checkov/.installed $(VENV)/ray/.installed  ## The tests that `make test` leaves out: whole notebooks, killed processes, containers, the browser.
	$(PYTEST) -m slow

docs-check: install  ## Committed figures, pages and notebooks: they show what is in results/, and links lead somewhere.
	$(PYTEST) -m docs

FLOOR_TESTS := $(foreach name,blip cache checkpoints cleaning cli collate dataset decoding duplicates evaluation extractor grammar hub_data \
	images models publish reports scenes schema sources startup tiles training,tests/test_$(name).py)

test-floors: $(VENV)/floors/.installed  ## The fast tests against the oldest supported versions, which are those that Colab has.
	$(VENV)/floors/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal -m "not slow and not docs" $(FLOOR_TESTS)

lint: install  ## ruff, the direction of the imports, and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy src

lock: install  ## Maintainers: resolve pyproject.toml again into requirements.txt. Pins stay as they are where they can.
	$(BIN)/uv pip compile --universal --python-version 3.11 --all-extras --no-annotate --no-emit-index-url pyproject.toml -o requirements.txt

refresh: demo experiments  ## Maintainers: commit-ready notebooks, tuned tiny model and README from `make demo` and `make experiments`.
	$(BIN)/python tools/pages.py --publish

tiny-base: install  ## Maintainers: make the tiny base again from nothing (about 70 minutes on 2 cores).
	$(BIN)/python experiments/tiny_base/make_tiny_base.py

clean:  ## Remove everything made here, .venv included.
	rm -rf $(VENV) $(OUT) experiments/$(OUT) .pytest_cache .ruff_cache src/*.egg-info
