# Every target runs the set-up first, which does nothing if it is up to date.
SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/setup.stamp

.DEFAULT_GOAL := help
.PHONY: help setup demo test overfit check docs bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' Makefile

setup: ## system packages, .venv, dependencies, FFCV and DALI; CONSTRAINTS=1: the tested versions
	@bash scripts/setup.sh

$(STAMP): setup.cfg pyproject.toml constraints.txt scripts/setup.sh
	@bash scripts/setup.sh

demo: $(STAMP) ## the main job on real images: convert, pretrain, evaluate (3 minutes, two cores)
	@$(BIN)/python scripts/demo.py

test: $(STAMP) ## the test suite
	@$(BIN)/python -m pytest -q --durations=10

overfit: $(STAMP) ## detectors and segmentation overfit eight images (7 minutes, two cores)
	@$(BIN)/python -m pytest -q -m overfit

check: $(STAMP) ## ruff, mypy --strict, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict rotpred pipelines
	@PYTHONPATH=benchmarks $(BIN)/lint-imports --no-logo

docs: $(STAMP) ## draw the sub-packages in docs/ from their imports
	@$(BIN)/python scripts/draw_imports.py

bench: $(STAMP) ## CPU benchmarks against others and the targets (10 minutes, two cores); BENCH_DATA=folder
	@$(BIN)/python benchmarks/run_all.py $(if $(BENCH_DATA),--data "$(BENCH_DATA)")

clean: ## remove .venv and caches; runs and beton files stay
	rm -rf .venv rotpred.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
