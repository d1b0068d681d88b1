# make demo | test | check | fix | cubins | gpu-proof | bench | tables | clean. The first one run makes .venv and installs all.
#   PYTHON=python3.12      the interpreter .venv is made with, 3.11 or later
#   PYTEST_ARGS="-k mask"  passed on to pytest, in place of these        DEMO_ARGS, BENCH_ARGS, PROOF_ARGS  likewise
#   OP=<op>                which benchmark `make bench` runs

PYTHON ?= python3
PYTEST_ARGS ?= -n auto -m "not slow"
OP ?= block_sparse_attention
BIN := .venv/bin
READY := .venv/.installed
# the Triton beside torch 2.11: GPU results may come from it, so its binaries are judged too
OLD_TRITON := .cache/triton-3.6.0

# The root stays off sys.path: there, our folder kernels/ would pass for Hugging Face's package `kernels`.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check fix cubins cubins-all gpu-proof bench tables clean

help:
	@echo "make demo    dense against sparse attention on a chest radiograph, and the models; writes demo_output/"
	@echo "make test    the tests, on the CPU and on a GPU where there is one; make test-all adds slow ones"
	@echo "make check   lint, format and types; changes nothing"
	@echo "make fix     lint and format, mending what can be mended"
	@echo "make cubins  compile the kernels for sm_80, sm_90, sm_100 and all rows of sm_90; needs no GPU"
	@echo "make cubins-all  every row with every feature, both versions of Triton; writes docs/cubins.md"
	@echo "make gpu-proof  prove every op on the GPU at hand; without one, rehearse it in the interpreter"
	@echo "make bench   one benchmark: make bench OP=block_sparse_attention"
	@echo "make tables  the README's tables and the plots, from benchmarks/results"
	@echo "make clean   remove what the others wrote, except .venv"

demo: $(READY)
	$(BIN)/python -m sparseattn demo $(DEMO_ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(READY)
	$(BIN)/python -m pytest -n auto

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every row for Hopper, every kernel for the others and with the older Triton: some minutes in all.
cubins: $(READY) $(OLD_TRITON)/.installed
	PYTHONPATH=benchmarks $(BIN)/python -m cubins --capability 90
	PYTHONPATH=benchmarks $(BIN)/python -m cubins --kernels --capability 80 --capability 100
	PYTHONPATH=$(OLD_TRITON):benchmarks $(BIN)/python -m cubins --kernels --capability 90

cubins-all: $(READY) $(OLD_TRITON)/.installed
	PYTHONPATH=benchmarks $(BIN)/python -m cubins --all --json build/cubins/pinned.json
	PYTHONPATH=$(OLD_TRITON):benchmarks $(BIN)/python -m cubins --all --json build/cubins/old.json
	PYTHONPATH=benchmarks $(BIN)/python -m cubins.table build/cubins/pinned.json build/cubins/old.json

gpu-proof: $(READY)
	$(BIN)/python benchmarks/gpu_proof.py $(PROOF_ARGS)

bench: $(READY)
	$(BIN)/python -m sparseattn bench $(OP) $(BENCH_ARGS)

tables: $(READY)
	$(BIN)/python -m sparseattn.benchmarks.tables

clean:
	rm -rf build dist *.egg-info demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find sparseattn kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and pinned: an open range could fetch another torch and its gigabytes of CUDA packages.
$(READY): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "needs Python 3.11 or later, $(PYTHON) is $$($(PYTHON) --version 2>&1); try: make PYTHON=python3.12"; exit 1; }
	@echo "[1/3] making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv || { echo "on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "[2/3] installing PyTorch: some minutes the first time"
	$(BIN)/python -m pip install torch -c constraints.txt
	@echo "[3/3] installing sparseattn and its tools"
	$(BIN)/python -m pip install -e ".[all]" -c constraints.txt
	@touch $@
	@echo "ready"

$(OLD_TRITON)/.installed: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) triton==3.6.0
	@touch $@
