# make train TASK=simp MODEL=stack      builds what is missing, in order: environment, data, m0, the stages before
# make help                             lists the targets and the settings

TASK   ?= simp
MODEL  ?= stack
NPROC  ?= 1
PYTHON ?= python3
ORDER  ?= simp empd inqqg exp hgen
# With INIT the stages start from that checkpoint, and SIZE, which names the folder, is the name of INIT by default.
SIZE   ?= $(if $(INIT),$(notdir $(patsubst %/,%,$(INIT))),tiny)
SOURCE := $(or $(SOURCE),$(if $(RAW),raw,$(if $(filter 410m 3b 7b,$(SIZE)),hub,sample)))
RAW    := $(or $(RAW),data/raw)
OUT    ?= runs/$(SIZE)/$(MODEL)
# The stages with a method lie in a folder of its name, beside the m0 that all methods start from.
METHOD ?=
CHAIN  := $(OUT)$(if $(METHOD),$(if $(filter train evaluate,$(MAKECMDGOALS)),/$(METHOD)))
RUNS   ?= runs/$(SIZE)
TASKS  ?= $(ORDER)
SUITE  ?= sample

FOLDER := $(if $(filter sample,$(SOURCE)),data/sample,$(RAW))
PRESET := $(wildcard configs/size/$(SIZE).toml)
HUB    := $(if $(PRESET),$(shell sed -n 's/^$(MODEL) *= *"\(.*\)".*/\1/p' $(PRESET)))
TEXT   ?= data/text/$(SIZE)
VENV   := .venv
PY     := $(VENV)/bin/python
# What stands before train.py, and the flag that says so to the scripts that call it themselves.
TORCHRUN := $(if $(filter-out 1,$(NPROC)),$(VENV)/bin/torchrun --standalone --nproc_per_node $(NPROC))
LAUNCH   := $(or $(TORCHRUN),$(PY))
FLAG     := $(if $(TORCHRUN),--launcher "$(TORCHRUN)")

ifneq (,$(filter train pretrain data evaluate experiment growth-study,$(or $(MAKECMDGOALS),help)))
  expect = $(if $(filter $2,$3),,$(error unknown $1 '$2', expected one of: $3))
  $(if $(filter train data evaluate,$(MAKECMDGOALS)),$(foreach task,$(TASK) $(TASKS),$(call expect,TASK,$(task),$(ORDER))))
  $(call expect,MODEL,$(MODEL),stack llm)
  $(if $(METHOD),$(if $(filter train evaluate,$(MAKECMDGOALS)),$(call expect,METHOD,$(METHOD),$(basename $(notdir $(wildcard configs/method/*.toml))))))
  $(call expect,SOURCE,$(SOURCE),sample raw hub)
  $(if $(INIT)$(and $(INIT_LLM),$(INIT_STACK))$(PRESET),,$(call expect,SIZE,$(SIZE),$(basename $(notdir $(wildcard configs/size/*.toml)))))
endif

.PHONY: help train pretrain data evaluate experiment report growth-study plan growth-plan test bench lint clean FORCE
.DELETE_ON_ERROR:

help:
	@echo 'make train TASK=simp MODEL=stack   fine-tune, after building whatever that needs'
	@echo 'make pretrain MODEL=stack|llm      build m0, the model that fine-tuning starts from'
	@echo 'make data TASK=simp                prepare a task'
	@echo 'make evaluate TASK=simp MODEL=stack  test sets and benchmarks of a stage, or of CHECKPOINT=dir'
	@echo 'make experiment SIZE=tiny           both models through the tasks, every stage evaluated, and the report'
	@echo 'make report RUNS=runs/tiny          tables and figures of a folder of evaluated runs, in report/'
	@echo 'make growth-study SIZE=small       loss over FLOPs, from scratch and grown: figure and table (SEEDS=42,43,44)'
	@echo 'make plan SIZE=7b NPROC=8           whether a run fits and how long it takes (ZERO=3 GPU_MEMORY=80 TOKENS=1e9)'
	@echo 'make growth-plan SIZE=7b TOKENS=300e9  when to grow, and what it saves (PARAMS=7e9 in place of SIZE)'
	@echo 'make bench                         speed beside what people use: bench/RESULTS.md (INIT, RAW, FILES of your own)'
	@echo 'make test | lint | clean           run the tests; check the style; remove the environment and prepared data'
	@echo
	@echo 'TASK    $(ORDER), in the order of the stages (ORDER)'
	@echo 'MODEL   stack (grown) or llm (full size from the start)'
	@echo 'SIZE    $(basename $(notdir $(wildcard configs/size/*.toml))) (now $(SIZE))'
	@echo 'SOURCE  sample (in data/sample), raw (the folder RAW) or hub (downloaded to RAW)'
	@echo 'RAW     folder of raw task folders    INIT   checkpoint to start from in place of m0: directory or Hub id'
	@echo 'OUT     folder of the stages          NPROC  processes'
	@echo 'METHOD  against forgetting: $(basename $(notdir $(wildcard configs/method/*.toml)));'
	@echo '        with experiment several with commas between them, and settings of theirs: ewc:ewc_strength=10'
	@echo 'SUITE   benchmarks of make evaluate: sample, paper, local, a .toml file, or none; FILES their folder'
	@echo 'TASKS   test sets of make evaluate (now $(TASKS))'
	@echo 'ARGS    more flags for train.py, such as ARGS="--learning_rate 1e-5" (train.py --help lists them);'
	@echo '        with train they go to all stages that are missing, with pretrain to its last phase; with'
	@echo '        growth-study, plan and growth-plan they are flags of growth_study.py, planner.py, stack.py plan'

# ------------------------------------------------------------------------------------------------- fine-tuning stages

# Each stage starts from the one before it; the first from INIT or m0.
PARENT := $(or $(INIT),$(OUT)/m0)
define stage
PARENT_$1 := $(PARENT)
STAGE_$1  := $(CHAIN)/m$(words m0 $(DONE))-$1
PARENT    := $(CHAIN)/m$(words m0 $(DONE))-$1
DONE      += $1
$(CHAIN)/m$(words m0 $(DONE))-$1: | $(filter-out $(INIT),$(PARENT)) data/prepared/$(SOURCE)/$1.json
	$$(call finetune,$1)
endef
$(foreach task,$(ORDER),$(eval $(call stage,$(task))))

finetune = $(LAUNCH) train.py --config configs/train/finetune.toml $(if $(PRESET),--size $(SIZE)) --task $1 \
    --init $(PARENT_$1) --data data/prepared/$(SOURCE)/$1.json --out $(STAGE_$1) \
    $(if $(METHOD),--method $(METHOD) $(if $(filter $1,$(firstword $(ORDER))),--rehearsal 0)) $(ARGS)

# The stage that is asked for is always handed to train.py, which sees whether it is finished and with these settings.
train: data | $(if $(wildcard $(STAGE_$(TASK))),,$(filter-out $(INIT),$(PARENT_$(TASK))))
	@$(call finetune,$(TASK))

data: data/prepared/$(SOURCE)/$(TASK).json

data/prepared/$(SOURCE)/%.json: FORCE | $(VENV)/user
	@$(if $(filter hub,$(SOURCE)),$(PY) data_prep.py hub --task $* --output_path $(RAW))
	@$(PY) data_prep.py task --task $* --folder_path $(FOLDER) --output_path $@

# ------------------------------------------------------------------------------------- m0: pretrained, or from the Hub

ifneq (,$(HUB))
  BEFORE := $(VENV)/user
  M0      = $(PY) -m model.hub $(HUB) $(OUT)/m0
else
  BEFORE := $(TEXT)
  M0      = $(PY) pretrain.py --size $(SIZE) --model $(MODEL) --data $(TEXT) --out $(OUT) $(FLAG) \
    $(if $(filter pretrain,$(MAKECMDGOALS)),$(if $(ARGS),--args="$(ARGS)"))
endif

# Like train, the last step is always handed to its script, which sees whether it is finished and with these settings.
pretrain: $(VENV)/user | $(if $(wildcard $(OUT)/m0),,$(BEFORE))
	@$(if $(HUB),test -d $(OUT)/m0 || $(M0),$(M0))
	@echo "m0: $(OUT)/m0"

$(TEXT): | $(VENV)/user
	$(PY) data_prep.py text --size $(SIZE) --output_path $@

$(OUT)/m0: | $(BEFORE)
	$(M0)

# ---------------------------------------------------------------------------------------------------------- evaluation

BENCHMARKS := $(filter-out none,$(SUITE))
comma := ,
space := $(subst ,, )
evaluate: $(VENV)/user $(TASKS:%=data/prepared/$(SOURCE)/%.json) | $(if $(CHECKPOINT),,$(STAGE_$(TASK))) \
    $(if $(filter sample,$(SUITE)),data/eval/sample)
	@$(LAUNCH) evaluate.py --checkpoint $(or $(CHECKPOINT),$(STAGE_$(TASK))) --data data/prepared/$(SOURCE) \
	    $(if $(TASKS),--tasks $(subst $(space),$(comma),$(strip $(TASKS)))) \
	    $(if $(BENCHMARKS),--suite $(BENCHMARKS)) $(if $(FILES),--suite_files $(FILES)) $(ARGS)

data/eval/sample: | $(VENV)/user
	@$(PY) data_prep.py suite --output_path $@

# ------------------------------------------------------------------------------------------- the experiment, the report

# The tasks in order: those of experiment.py, if ORDER is not given.
CHOSEN := $(if $(filter-out file,$(origin ORDER)),$(ORDER))
experiment: $(VENV)/user $(patsubst %,data/prepared/$(SOURCE)/%.json,$(or $(CHOSEN),simp empd inqqg)) \
    | $(if $(HUB)$(and $(INIT_LLM),$(INIT_STACK)),,$(TEXT)) $(if $(filter sample,$(SUITE)),data/eval/sample)
	@$(PY) experiment.py $(if $(PRESET),--size $(SIZE)) --data data/prepared/$(SOURCE) --out $(RUNS) --suite $(SUITE) \
	    $(if $(HUB)$(and $(INIT_LLM),$(INIT_STACK)),,--text $(TEXT)) $(if $(CHOSEN),--order $(subst $(space),$(comma),$(strip $(CHOSEN)))) \
	    $(if $(INIT_LLM),--init_llm $(INIT_LLM)) $(if $(INIT_STACK),--init_stack $(INIT_STACK)) \
	    $(if $(SEEDS),--seeds $(SEEDS)) $(if $(METHOD),--methods $(METHOD)) $(if $(FILES),--suite_files $(FILES)) \
	    $(if $(LAUNCHER),--launcher $(LAUNCHER),$(FLAG)) $(ARGS)

report: $(VENV)/user
	@$(PY) report.py --runs $(RUNS) $(ARGS)

# ------------------------------------------------------------------------------------------------- whether growing pays

growth-study: $(VENV)/user | $(TEXT)
	@$(PY) -m pipeline.growth_study --size $(SIZE) --data $(TEXT) --out $(or $(STUDY),runs/$(SIZE)/growth-study) $(FLAG) \
	    $(if $(SEEDS),--seeds $(SEEDS)) $(ARGS)

plan: $(VENV)/user
	@$(PY) -m pipeline.memory_plan $(if $(INIT),--init $(INIT),--size $(SIZE)) --processes $(NPROC) $(if $(ZERO),--zero $(ZERO)) \
	    $(if $(GPU_MEMORY),--gpu_memory $(GPU_MEMORY)) $(if $(TOKENS),--tokens $(TOKENS)) $(ARGS)

growth-plan: $(VENV)/user
	@$(PY) stack.py plan $(if $(PARAMS),--params $(PARAMS)) $(if $(filter-out file,$(origin SIZE)),--size $(SIZE)) \
	    $(if $(TOKENS),--tokens $(TOKENS)) $(ARGS)

# --------------------------------------------------------------------------------------- the environment and the tests

$(VENV)/user: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: Python 3.11 or later is needed, $$($(PYTHON) --version) found: set PYTHON=…" >&2; exit 2; }
	@echo 'installing the packages of requirements.txt into $(VENV), once; this takes some minutes'
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/user
	@echo 'installing the packages of requirements-dev.txt into $(VENV), once'
	@$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# In as many processes as the machine has cores, up to four, of one thread each.
test: $(VENV)/dev
	OMP_NUM_THREADS=1 SMOLLM2=$(abspath $(SMOLLM2)) $(PY) -m pytest -q -n logical --maxprocesses 4 --dist loadfile $(ARGS)

bench: $(VENV)/dev data/prepared/$(SOURCE)/simp.json | $(if $(FILES),,data/eval/sample)
	@$(PY) bench/run_all.py --data data/prepared/$(SOURCE)/simp.json --folder runs/bench \
	    $(if $(INIT),--checkpoint $(INIT)) $(if $(FILES),--files $(FILES)) $(ARGS)

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) data/prepared data/text data/eval .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo 'runs/ and data/raw are left as they are'
