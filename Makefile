# Everything runs in .venv, which any target below makes and fills when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/quickstart.yaml
OUT ?=

.DEFAULT_GOAL := help
.PHONY: help run test lint types contract unit fuzz chaos extras docs notebooks gallery live gpu bench bench-optim figures reproduce clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

$(BIN)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(BIN)/.test: $(BIN)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,flower]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt -r tests/oracles.txt
	touch $@

$(BIN)/.docs: $(BIN)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

run: $(BIN)/.run ## set up and run the main job (CONFIG=..., OUT=...)
	$(BIN)/fedsim run $(CONFIG) $(if $(OUT),--out $(OUT))

test: lint types contract unit ## set up, then lint, types, import contract and all tests

lint: $(BIN)/.test ## formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(BIN)/.test ## static types
	$(BIN)/mypy

contract: $(BIN)/.test ## who may import whom
	$(BIN)/lint-imports

unit: $(BIN)/.test ## the tests alone
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not flower and not alone and not chaos"

fuzz: $(BIN)/.test ## damaged packets, records, checkpoints and configs by the thousand (minutes)
	FUZZ=1 $(BIN)/pytest -n 2 tests/fuzz

chaos: $(BIN)/.test ## 100 random SIGKILLs over all strategies, on Ray and in a Flower deployment too (half an hour; CHAOS_SEED=N)
	$(BIN)/pytest -m chaos tests/chaos -s

extras: $(BIN)/.test ## every extra resolves from the constraints file (nothing is installed)
	@for extra in $$($(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies'])"); do \
	    echo "$$extra"; \
	    $(BIN)/uv pip compile --quiet --extra "$$extra" --constraints constraints.txt pyproject.toml > /dev/null || exit 1; \
	done

docs: $(BIN)/.docs ## the documentation site, into site/; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

notebooks: $(BIN)/.docs ## run the notebooks of docs/notebooks/ in a kernel and keep what they show
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[notebooks]'
	$(BIN)/jupyter execute --inplace docs/notebooks/*.ipynb

gallery: $(BIN)/.run ## the pictures of docs/gallery/: one run of every strategy
	$(BIN)/python -m benchmarks.gallery

live: $(BIN)/.test ## a real Flower SuperLink and SuperNodes on loopback; every strategy on Ray and under torchrun (minutes)
	$(BIN)/pytest -m flower tests/flower_live
	$(BIN)/pytest -m alone tests

gpu: $(BIN)/.test ## on a machine with a GPU: its tests, then the figures of docs/benchmarks-gpu.md
	$(BIN)/pytest -m gpu tests/contracts
	$(BIN)/python -m benchmarks.gpu --page docs/benchmarks-gpu.md

bench: $(BIN)/.test ## the standing workloads beside the plain loop, as ratios
	$(BIN)/python -m benchmarks.rounds
	$(BIN)/python -m benchmarks.zoo
	$(BIN)/python -m benchmarks.strategies
	$(BIN)/python -m benchmarks.selection
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.bench_aggregate
	$(BIN)/python -m benchmarks.bench_compress
	$(BIN)/python -m benchmarks.bench_private
	$(BIN)/python -m benchmarks.planes
	$(BIN)/python -m benchmarks.planes --nodes 2
	$(BIN)/python -m benchmarks.serial
	$(BIN)/python -m benchmarks.lora
	$(BIN)/python -m benchmarks.copies

bench-optim: $(BIN)/.test ## the optimizer core beside torch's own kernels, as ratios
	$(BIN)/python -m benchmarks.bench_optim

figures: $(BIN)/.run ## the figures of docs/first-results.md and docs/optimizers.md
	$(BIN)/python -m benchmarks.first_results
	$(BIN)/python -m benchmarks.optimizer_study

reproduce: $(BIN)/.run ## a published result, with its page in docs/reproductions/ (NAME=coding, momentum, ...; QUICK=1 to try)
	$(BIN)/python -m benchmarks.reproduce $(NAME) $(if $(QUICK),--quick)

clean: ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build site *.egg-info
