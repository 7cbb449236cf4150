# make demo   set up, then fine-tune the embedded model with and without a defense (ten minutes on two CPU cores)
# make test   set up, then all tests
# make test-fast   those that take no training and no other process, in a minute or two
# make test-deepspeed   build DeepSpeed, which has no wheels, and train with it on two processes; after that `make test` does so, too
# make bench  set up, then measure time and memory against the bounds of docs/performance.md (about an hour and a half
#             on two quiet CPU cores); with QUICK=1 a small version into runs/bench, which shows that all of it runs
# make test-oldest, make test-newest   the tests that touch the libraries, with the oldest and newest releases allowed
# make constraints   pin the newest releases (docs/development.md)
# make docs   build the site of docs/ into site/, and fail on a page or link that is not there
VENV := .venv
PYTHON ?= python3
RINGFENCE := $(VENV)/bin/ringfence

.PHONY: demo demo-quick docs test test-fast test-deepspeed test-oldest test-newest constraints check bench clean

demo: $(VENV)/installed
	$(RINGFENCE) demo

demo-quick: $(VENV)/installed
	$(RINGFENCE) demo --quick

# A file of tests in each process, one thread each: models of tests are too small for more. Files in their order, since
# xdist would leave those with few tests, which are the slowest, to the end.
pytest = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: $(VENV)/installed
	$(call pytest,$(VENV)) --durations 15

test-fast: $(VENV)/installed
	$(call pytest,$(VENV)) -m 'not slow'

test-deepspeed: $(VENV)/installed
	DS_BUILD_OPS=0 $(VENV)/bin/python -m pip install --quiet --no-build-isolation -c constraints.txt deepspeed==0.19.8
	$(call pytest,$(VENV)) tests/training/test_distributed.py -k 'zero or deepspeed'

check: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -r requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

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

# constraints.txt holds the releases that the tests were last run with on Python 3.11. Another Python takes the newest
# releases that pyproject.toml allows, untested. With an NVIDIA driver, pip chooses torch's build and release; without
# one, a CPU build is taken where the index has one.
IS_PINNED := $(shell $(PYTHON) -c 'import sys; print(*["yes"] * (sys.version_info[:2] == (3, 11)))')
HAS_NVIDIA := $(shell command -v nvidia-smi)
TORCH := torch==2.13.0

# A virtual environment: its folder, and what else pip is told.
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade pip
	$(if $(HAS_NVIDIA),,$(1)/bin/python -m pip install --quiet $(TORCH) || true)
	$(1)/bin/python -m pip install --quiet $(2) --editable '.[dev]'
	touch $(1)/installed
endef

$(VENV)/installed: pyproject.toml constraints.txt
	$(if $(HAS_NVIDIA),mkdir -p $(VENV) && grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt)
	$(call install,$(VENV),$(if $(IS_PINNED),-c $(if $(HAS_NVIDIA),$(VENV)/constraints.txt,constraints.txt)))

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(call install,.venv-oldest,-c constraints-oldest.txt)

.venv-newest/installed: pyproject.toml
	$(call install,.venv-newest,--upgrade --upgrade-strategy eager $(if $(HAS_NVIDIA),,$(TORCH)))

# The tests that touch the libraries most.
LIBRARIES := $(patsubst %,tests/%.py,text/test_chat text/test_data model/test_patching \
	defenses/test_frozen_prefix defenses/test_composition training/test_trainer training/test_packing \
	training/test_monitor evaluate/test_evaluate evaluate/test_inspect diagnose/test_perturbation \
	run/test_patch faults/test_versions)

test-oldest: .venv-oldest/installed
	$(call pytest,.venv-oldest) $(LIBRARIES)

test-newest: .venv-newest/installed
	$(call pytest,.venv-newest) $(LIBRARIES)

constraints:
	rm -rf .venv-newest
	$(MAKE) .venv-newest/installed
	(echo '# The releases that all tests were last run with, on Python 3.11. `make constraints` makes this file again.'; \
	  .venv-newest/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//') > constraints.txt

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .pytest_cache .mypy_cache .ruff_cache
