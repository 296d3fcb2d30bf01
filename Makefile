# The commands for a first day. The first target makes the virtual environment. PYTHON may name another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles a module when it first imports it, so the install does not compile the thousands that nothing imports.
PIP := --quiet --disable-pip-version-check --no-compile
# Python would then compile all that it imports in each process anew.
unexport PYTHONDONTWRITEBYTECODE
# What is compiled, and how: setup.py describes it. If that changes, `make` builds the kernel again.
KERNEL := clients/fedtune_clients/kernel.c setup.py
PLATFORMS := manylinux_2_28_x86_64 manylinux_2_28_aarch64 macosx_11_0_arm64 win_amd64

.PHONY: install demo test lint wheels clean

install: $(VENV)/installed

demo: $(VENV)/installed
	$(BIN)/fedtune compare mnist --tuners manual,random,asha,fedex --max-rounds 27 --total-rounds 135 --seeds 2 \
		--set data.num_clients=200 --set evaluation.every=3 --out runs/demo --force

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# A wheel for each platform, in dist. All are built on one machine, and none without its kernel.
wheels: $(VENV)/installed
	for platform in $(PLATFORMS); do \
		FEDTUNE_KERNEL=require $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist . \
			--config-settings=--build-option=--plat-name=$$platform || exit; done

clean:
	rm -rf $(VENV) build *.egg-info clients/fedtune_clients/libkernel.*

# torch is installed first: so pip takes the build that it is set to find, not a build that another package asks for.
# If pip can't install the compiler of the kernel, the package is installed without a kernel.
$(VENV)/installed: pyproject.toml $(KERNEL)
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "fedtune needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP) torch==2.13.0
	$(BIN)/python -m pip install $(PIP) --editable '.[dev]' || { test "$$FEDTUNE_KERNEL" != require && \
		FEDTUNE_KERNEL=skip $(BIN)/python -m pip install $(PIP) --no-build-isolation --editable '.[dev]'; }
	touch $@
	@$(BIN)/fedtune doctor | grep ^engine
