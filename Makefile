# make demo   set up, then fine-tune the embedded model with and without defenses (about 30 minutes on two CPU cores)
# make test   set up, then all tests
# make bench  set up, then measure time and memory against the bounds of docs/performance.md (about an hour and a half
#             on two quiet CPU cores); with QUICK=1 a small version into runs/bench, which shows that all of it runs
VENV := .venv
PYTHON ?= python3
RINGFENCE := $(VENV)/bin/ringfence

.PHONY: demo demo-quick test check bench clean

demo: $(VENV)/installed
	$(RINGFENCE) demo

demo-quick: $(VENV)/installed
	$(RINGFENCE) demo --quick

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest

check: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

ifdef QUICK
RESULTS := runs/bench
FIGURES := runs/bench
STEPS := --shape small --sittings 2 --rounds 1
MEMORY := --shape small --tokens 128 --processes 1
SCORING := --quick
KL := --tokens 64 --vocabulary 8192 --hidden 64 --rounds 1
SCALING := --quick
else
RESULTS := benchmarks/results/performance
FIGURES := docs/figures/performance
endif
PERFORMANCE := $(VENV)/bin/python benchmarks/performance

bench: $(VENV)/installed
	$(PERFORMANCE)/steps.py --results $(RESULTS) $(STEPS)
	$(PERFORMANCE)/memory.py --results $(RESULTS) $(MEMORY)
	$(PERFORMANCE)/scoring.py --results $(RESULTS) $(SCORING)
	$(PERFORMANCE)/kl.py --results $(RESULTS) $(KL)
	$(PERFORMANCE)/scaling.py --output $(RESULTS)/scaling.json --figures $(FIGURES) $(SCALING)
	$(PERFORMANCE)/table.py --results $(RESULTS) --figures $(FIGURES)

# Without an NVIDIA driver, a CPU build of torch is taken where the index has one for this Python; else pip chooses.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	command -v nvidia-smi >/dev/null || $(VENV)/bin/python -m pip install --quiet torch==2.13.0 || true
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
