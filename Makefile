.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
PYTHON := $(BIN)/python
SYSTEM_PYTHON ?= python3
STAMP := $(VENV)/.installed
NUM_PACKAGES = $(shell grep -c '==' requirements.lock)
# A test run leaves no usage report and asks no server for one.
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

# Print every four seconds that a silent command still runs: $(call told,what it does,command)
define told
@echo "$(1) ..." >&2; \
(t=0; while sleep 4 > /dev/null; do t=$$((t + 4)); echo "still $(1), $$t s" >&2; done) & beat=$$!; \
trap 'kill $$beat' EXIT; $(2)
endef

.PHONY: help
help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

$(STAMP): requirements.lock pyproject.toml
	@$(SYSTEM_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; set SYSTEM_PYTHON=/path/to/python3.11"; exit 2; }
	$(call told,making $(VENV),$(SYSTEM_PYTHON) -m venv $(VENV))
	$(call told,installing the $(NUM_PACKAGES) packages of requirements.lock (about two minutes),\
	  $(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.lock)
	$(call told,installing mae,\
	  PYTHONWARNINGS=ignore $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --editable .)
	@touch $@

.PHONY: install
install: $(STAMP)  ## Build .venv from requirements.lock
	@echo "Installed. Next: make demo, or: source $(VENV)/bin/activate && mae --help"

.PHONY: demo
demo: $(STAMP)  ## Draw a small data set, pretrain on it, show what was learned (2 minutes, no server, no GPU)
	$(BIN)/mae prepare configs/prepare/demo.yaml
	$(BIN)/mae pretrain configs/pretrain/demo.yaml

.PHONY: format
format: $(STAMP)  ## Rewrite files to the house format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

.PHONY: check
check: $(STAMP)  ## Check format, lint, types and layers; writes nothing
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(BIN)/lint-imports

.PHONY: test
test: $(STAMP)  ## Run all tests: core, Ray, services (no GPU needed)
	$(PYTHON) -m pytest -m "not compile and not gpu" --numprocesses 2 --dist loadfile
	SHAPE_CHECKS=0 $(PYTHON) -m pytest -m "compile and not gpu"

.PHONY: test-fast
test-fast: $(STAMP)  ## Run the tests that start neither Ray nor a service
	$(PYTHON) -m pytest -m "not (ray or services or slow or compile)"

.PHONY: up
up: $(STAMP)  ## Start an object store, MLflow and a Ray head on loopback
	$(call told,starting the services,$(PYTHON) -m infra.services up)

.PHONY: down
down: $(STAMP)  ## Stop what `make up` started and nothing else
	$(call told,stopping the services,$(PYTHON) -m infra.services down)

.PHONY: mlflow-ui
mlflow-ui: $(STAMP)  ## Open the local MLflow store on http://127.0.0.1:5000
	$(BIN)/mlflow ui --backend-store-uri sqlite:///$(CURDIR)/runs/mlflow.db

.PHONY: render
render: $(STAMP)  ## Print the Kubernetes manifests of configs/cluster/kuberay.yaml
	@$(PYTHON) -m infra.kuberay render configs/cluster/kuberay.yaml

.PHONY: bench-data
bench-data: $(STAMP)  ## Measure reading and decoding; DATA="a.tar b.tar" for your images
	$(call told,measuring,$(PYTHON) benchmarks/data.py $(DATA))

.PHONY: gpu-check
gpu-check:  ## On a machine with a GPU: test and measure the step and the decoders (8 minutes, no install)
	$(or $(wildcard $(PYTHON)),$(SYSTEM_PYTHON)) benchmarks/gpu_check.py

.PHONY: bench-step
bench-step: $(STAMP)  ## Measure a training step beside transformers' (and lightly's, if it is installed)
	$(call told,measuring,$(PYTHON) benchmarks/train_step.py)

.PHONY: bench-startup
bench-startup: $(STAMP)  ## Measure what each command takes before it works; TIMES=3 turns
	$(call told,measuring,$(PYTHON) benchmarks/startup.py)

.PHONY: chaos
chaos: $(STAMP)  ## Stop and kill runs at random steps and show what each lost; TIMES=10 of each
	$(PYTHON) benchmarks/stopping.py $(or $(TIMES),3)

.PHONY: check-fair-weights
check-fair-weights: $(STAMP)  ## Check the MAE authors' file FILE=...pth; IMAGENET=folder measures it
	@test -n "$(FILE)" || { echo "FILE=mae_pretrain_vit_base.pth is missing"; exit 2; }
	$(PYTHON) benchmarks/fair_weights.py "$(FILE)" $(if $(IMAGENET),"$(IMAGENET)") $(if $(IMAGENET),$(IMAGES))

.PHONY: docs
docs: $(STAMP)  ## Write docs/reference from the fields of the configs
	$(PYTHON) docs/reference/generate.py

.PHONY: docs-site
docs-site: $(STAMP)  ## Build the documentation as a site with search: site/index.html
	$(PYTHON) -m sphinx --quiet -n -W --keep-going docs site
	@echo "Open site/index.html"

.PHONY: ci
ci: check test  ## Run all checks and all tests, as CI does

.PHONY: clean
clean:  ## Remove caches and the demo's data and runs; keeps .venv
	rm -rf data runs mlruns site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
