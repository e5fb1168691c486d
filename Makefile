# make train TASK=simp MODEL=stack      builds what is missing, in order: environment, data, m0, the earlier stages
# make help                             lists the targets and the variables
#
# The environment is installed by pipeline/environment.py. Everything else is done by pipeline/targets.py, which reads the
# variables from the environment of its process.

PYTHON ?= python3

# Exports the variables of the command line literally: neither make nor the shell expands their values. GIVEN: their
# names. GOALS: the targets of this call.
export GIVEN :=
export GOALS := $(MAKECMDGOALS)
$(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),\
    $(eval override $(name) := $$(value $(name)))$(eval export $(name))$(eval GIVEN += $(name))))

# With DRY_RUN=1 the commands are printed and none is run, so that no environment is needed. What `make clean` removes
# cannot be changed on the command line.
override VENV    := .venv
override CLEANED := $(VENV) $(VENV).lock data/prepared .pytest_cache .ruff_cache .mypy_cache
DRY          := $(filter-out 0,$(value DRY_RUN))
RUN          := $(if $(DRY),$(PYTHON),$(VENV)/bin/python) -m pipeline.targets
PACKAGES     := $(if $(DRY),,$(VENV)/user)
DEV_PACKAGES := $(if $(DRY),,$(VENV)/dev)

.PHONY: help train pretrain data evaluate experiment experiment-plan report growth-study plan growth-plan bench \
	test lint clean

help:
	@$(check_python)
	@$(PYTHON) -m pipeline.targets help

train pretrain data evaluate experiment experiment-plan report growth-study plan growth-plan: $(PACKAGES)
	@$(RUN) $@

bench test lint: $(DEV_PACKAGES)
	@$(RUN) $@

clean:
	$(if $(DRY),@echo) rm -rf $(CLEANED)
	$(if $(DRY),@echo) find . -name __pycache__ -type d -prune -exec rm -rf {} +

define check_python
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
    echo "error: Python 3.11 or later is needed, $$($(PYTHON) --version) found: set PYTHON=…" >&2; exit 2; }
endef

$(VENV)/user: requirements.txt
	@$(check_python)
	@$(PYTHON) -m pipeline.environment $@ $^

$(VENV)/dev: requirements-dev.txt $(VENV)/user
	@$(PYTHON) -m pipeline.environment $@ $^
