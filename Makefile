# Two commands: `make demo` sets everything up and runs the main job; `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SLIMPI := $(BIN)/slimpi
# The compiled part of the installation: llama.cpp without its image support, and without AMX. GCC 12 compiles the loading
# of AMX's tile configuration wrongly (it drops stores to all but its first 8 bytes), so that llama.cpp dies of SIGSEGV.
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF -DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__
export TOKENIZERS_PARALLELISM := false

DEMO_RECIPES := models/smollm2-135m.toml models/minilm-l6-tweets.toml

# The device and what it gets: `make deploy-pi PI=pi@raspberrypi.local`, PI="pi@a pi@b", PI=emulated; other recipes
# with RECIPES="models/a.toml models/b.toml", all their variants or those of PI_VARIANTS.
PI ?=
RECIPES ?= $(DEMO_RECIPES)
PI_VARIANTS ?= $(if $(filter-out $(DEMO_RECIPES),$(RECIPES)),,Q8_0 Q4_K_M Q4_0 INT8-dynamic)
# Under emulation everything takes 30 to 300 times as long: enough work to show that it is right.
EMULATED_SIZES := --n-ctx 64 --n-chunks 2 --n-prompt 16 --n-gen 4 --repetitions 3 --limit 16
DEPLOY_SIZES ?= $(if $(filter emulated,$(PI)),$(EMULATED_SIZES))

.PHONY: demo install test test-slow lint bench-peers bench-quality bench-speed bench-plans bench-mxq bench-prune bench-classify bench-int8 peers tweets tweets-ablation fault-drill deploy-pi pi-emulator clean help

help:           ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/ /'

demo: install   ## set up, build every variant of two small models, run them here, print the comparison
	$(SLIMPI) deploy $(DEMO_RECIPES) --on local $(DEPLOY_SIZES)

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[host,dev]'
	touch $@

test: install   ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2

test-slow: install  ## the slow rest: real models
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2

lint: install   ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

deploy-pi: install  ## build, send to PI, measure there, print the comparison
	@test -n "$(PI)" || { echo 'name the device: make deploy-pi PI=pi@raspberrypi.local (or PI=emulated)'; exit 1; }
	$(SLIMPI) deploy $(RECIPES) $(addprefix --only ,$(PI_VARIANTS)) $(addprefix --on ,$(PI)) $(DEPLOY_SIZES)

pi-emulator: install  ## build and boot the emulated Pi (QEMU Cortex-A72, ssh on loopback)
	$(BIN)/python -m pipeline.emulator up

peers: install  ## llama.cpp's own tools, from the sources of the installed package
	$(BIN)/python benchmarks/llama_tools.py

bench-peers: install  ## perplexity and speed against llama.cpp's own tools, same build, same files
	$(SLIMPI) build models/smollm2-135m.toml
	$(BIN)/python benchmarks/peers.py

bench-int8: install  ## INT8 classifiers against fp32: flips, accuracy, size; five seeds a task (an hour; goes on where it was stopped)
	$(BIN)/python benchmarks/int8_table.py

bench-quality: install  ## KL divergence and perplexity at equal bytes against llama-quantize (hours; goes on where it was stopped)
	$(BIN)/python benchmarks/bench_quality.py

bench-classify: install  ## a tweet's latency against optimum's dynamic INT8 padded to 128, and raw ONNX Runtime (needs SLIMPI_DATA)
	$(SLIMPI) build models/tweets-minilm.toml
	$(BIN)/python benchmarks/classify_speed.py

bench-speed: install  ## seconds, memory and KL divergence of quantizing SmolLM2, against hqq, nncf, auto-round, llmcompressor, llama-quantize
	$(BIN)/python benchmarks/quantize_speed.py

bench-plans: install  ## programs by three measures, a genetic algorithm and a search at one size, by measured KL divergence
	$(BIN)/python benchmarks/plan_table.py

bench-mxq: install  ## MXQ's table: perplexity and KL divergence at 4.75 to 2.75 bits, against HQQ, GPTQ and AWQ (hours; resumable)
	$(BIN)/python benchmarks/mxq_table.py models/gemma-3-270m.toml

bench-prune: install  ## ways of pruning at 10, 20, 30 %, against llama-quantize --prune-layers, crossed with quantizing; and of the tweets' classifier (a day; resumable)
	$(BIN)/python benchmarks/prune_table.py --discard
	$(BIN)/python benchmarks/prune_encoders.py

tweets: install   ## every classifier of disaster tweets: grouped 5-fold, artifact, latency here, submission (hours; resumable)
	$(BIN)/python benchmarks/tweets.py

tweets-ablation: install  ## what each cleaning step is worth on the disaster tweets (half an hour; goes on where it was stopped)
	$(BIN)/python benchmarks/tweets_ablation.py

fault-drill: install  ## break the agent and the depot in every known way, count what is lost (10 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fault_drill.py

clean:          ## remove what was built, keep sources and results
	-test ! -x $(BIN)/python || $(BIN)/python -m pipeline.emulator down
	rm -rf models/artifacts
