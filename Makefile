# make demo   set up, then fine-tune the embedded model with and without defenses (about 30 minutes on two CPU cores)
# make test   set up, then all tests
VENV := .venv
PYTHON ?= python3
RINGFENCE := $(VENV)/bin/ringfence

.PHONY: demo demo-quick test check clean

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

# Without an NVIDIA driver, a CPU build of torch is taken where the index has one for this Python; else pip chooses.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	command -v nvidia-smi >/dev/null || $(VENV)/bin/python -m pip install --quiet torch==2.13.0 || true
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
