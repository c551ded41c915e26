# The same commands for everybody. `make help` lists them.
PYTHON ?= python3
PROFILE ?= quick
LAUNCHER ?= local
DRY_RUN ?=
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup test reproduce-paper figure report reference bench wandb-view wandb-sync wandb-dashboard lint lock clean test-cluster

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## Create .venv with the locked versions (PYTHON=python3.12 chooses the interpreter)

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed, $(PYTHON) is %d.%d; type make setup PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@$(BIN)/python -c 'import torch, torchvision' || { echo 'error: torch and torchvision do not fit together (a CPU-only torch does not load torchvision); type: rm -rf .venv && make setup, with an index that has the default build of torch' >&2; exit 1; }
	@touch $@

test: setup  ## Run all tests and doctests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto $(ARGS)

test-cluster: setup  ## Sweeps on a real Slurm and a real Ray on this machine, with a node killed (root; apt-get install slurm-wlm munge)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements-cluster.lock
	OMP_NUM_THREADS=1 CLUSTER=1 $(BIN)/python -m pytest -q tests/cluster $(ARGS)

reproduce-paper: setup  ## Tune, train and analyse a profile (PROFILE=quick|unseen|drawn|cpu|paper, DRY_RUN=1, LAUNCHER=local|joblib|slurm|ray)
	@$(BIN)/python -m runners.reproduce profile=$(PROFILE) launcher=$(LAUNCHER) $(if $(filter-out 0,$(DRY_RUN)),dry_run=true) $(ARGS)

figure: setup  ## Make what one figure of docs/figures.md needs, and draw it (N=1..11, PROFILE=quick|unseen|drawn|cpu|paper)
	@$(BIN)/python -m runners.reproduce experiment=figure_$(N) profile=$(PROFILE) launcher=$(LAUNCHER) $(if $(filter-out 0,$(DRY_RUN)),dry_run=true) $(ARGS)

report: setup  ## Make the report of a profile's records again, of the committed ones where there are no others (PROFILE=quick|unseen|drawn|cpu|paper)
	@$(BIN)/python -m analysis.report $(firstword $(wildcard results/$(PROFILE)/runs/.. results/reference/$(PROFILE)) results/$(PROFILE))

reference: setup  ## Keep a profile's records and report in results/reference, to be committed (PROFILE=quick|unseen|drawn|cpu|paper)
	@$(BIN)/python -m analysis.reference results/$(PROFILE) results/reference/$(PROFILE)

bench: setup  ## Time and memory of every method's step beside SGD-m's (ARGS='workloads=[gcn_cora] seconds=60')
	@$(BIN)/python -m runners.bench $(ARGS)

wandb-view: setup  ## Browse the mirrored runs in the terminal
	@$(BIN)/wandb leet $${WANDB_DIR:-.}/wandb

wandb-sync: setup  ## Mirror a profile's records and upload every run that is not uploaded yet (after wandb login)
	@$(BIN)/python -m runners.tracking profile=$(PROFILE) $(ARGS)

wandb-dashboard: setup  ## Save W&B workspaces for a profile's records, a view per task (after wandb login)
	@$(BIN)/python -m runners.dashboard profile=$(PROFILE) $(ARGS)

lint: setup  ## Check style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

lock: setup  ## Resolve the versions in requirements.lock anew
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra dashboard --extra dev --extra peers pyproject.toml -o requirements.lock
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra cluster pyproject.toml -c requirements.lock -o requirements-cluster.lock

clean:  ## Remove caches; keeps .venv, data and results
	rm -rf .pytest_cache .ruff_cache .hypothesis .cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
