# Everything sets itself up: the first target that needs the environment makes it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
MODEL := $(if $(model),--model $(model))
PARALLEL := -n 2 --dist worksteal

.PHONY: run plan check frontier measure compare sweep chat doctor test test-all coverage lint schema docs bench bench-accuracy bench-validate bench-decode bench-fit bench-peers fuzz clean help
.DEFAULT_GOAL := run

run: $(READY)  ## make recipe=NAME [model=FOLDER]: run a recipe
	@$(if $(recipe),,$(MAKE) -s help; exit 2)
	@$(BIN)/python -m lowbit run $(recipe) $(MODEL)

plan: $(READY)  ## make plan recipe=NAME [model=FOLDER]: what a run would do; touches nothing
	@$(BIN)/python -m lowbit plan $(recipe) $(MODEL)

frontier: $(READY)  ## make frontier recipe=NAME: how good the model can be at every size, a table and a picture
	@$(BIN)/python -m lowbit frontier $(recipe) $(MODEL)

measure: $(READY)  ## how fast each width is here; writes recipes/targets/*-here.yaml
	@$(BIN)/python -m lowbit measure

compare: $(READY)  ## make compare a=NAME b=NAME ...: finished results side by side
	@$(BIN)/python -m lowbit compare $(foreach one,a b c d e f g h,$(if $($(one)),build/$($(one))))

sweep: $(READY)  ## make sweep recipe=NAME vary="passes.quantize_matmul.bits=4,3,2 ...": every combination, then compared
	@$(BIN)/python -m lowbit sweep $(recipe) --vary "$(vary)" $(MODEL)

chat: $(READY)  ## make chat recipe=NAME [prompt="..."]: talk to a finished result
	@$(BIN)/python -m lowbit chat build/$(recipe) $(if $(prompt),--prompt "$(prompt)")

doctor: $(READY)  ## what is here, what is missing, what to do
	@$(BIN)/python -m lowbit doctor

check: $(READY)  ## make check recipe=NAME: prove a finished result again
	@$(BIN)/python -m lowbit check build/$(recipe)

test: $(READY)  ## the tests, within ten minutes on two cores; make test-all: those too that take minutes each
	@$(BIN)/python -m pytest $(PARALLEL)

coverage: $(READY)  ## the tests once more, and the lines that none of them reaches; takes twice as long
	@$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report term-missing:skip-covered

test-all: $(READY)
	@$(BIN)/python -m pytest $(PARALLEL) -m ""

lint: $(READY)  ## ruff, mypy --strict, and the floors of the house
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@cd .venv/lint && ../bin/lint-imports --no-cache ../../pyproject.toml

schema: $(READY)  ## write recipes/schema.json
	@$(BIN)/python -m lowbit schema > recipes/schema.json

docs: $(READY)  ## the documentation as a site in site/; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict && echo "  site/index.html"

bench: $(READY)  ## make bench [shape=7b]: memory and time on a checkpoint of true size (0.5b by default), with peers
	@$(BIN)/python -m tests.bench.scale $(if $(shape),--shape $(shape)) $(if $(windows),--windows $(windows))

bench-accuracy: $(READY)  ## make bench-accuracy [bits="3 2"] [blocks=64]: quality of every method; [shape=7b-layer]: time and memory
	@$(BIN)/python -m $(if $(shape),tests.bench.layer,tests.bench.accuracy $(if $(bits),--bits $(bits)) $(if $(blocks),--blocks $(blocks)))

bench-validate: $(READY)  ## make bench-validate model=FOLDER [windows=4]: validation beside plain passes of the float model in onnxruntime
	@$(BIN)/python -m tests.bench.validate --model $(model) $(if $(windows),--windows $(windows))

bench-decode: $(READY)  ## make bench-decode [shape=0.5b]: tokens per second, ours beside onnxruntime-genai's builder and the plain graph
	@$(BIN)/python -m tests.bench.decode $(if $(shape),--shape $(shape))

bench-fit: $(READY)  ## mixed bits against uniform ones of the same size
	@$(BIN)/python -m tests.bench.fit

bench-peers: $(READY)  ## a table of docs/quality.md: onnxruntime's quantizer and MNN's converter beside ours
	@$(BIN)/python -m tests.bench.peers

fuzz: $(READY)  ## make fuzz [minutes=10] [target=NAME] [cores=N]: readers of strangers' files, fed with what breaks them
	@$(BIN)/python -c "import atheris" 2> /dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint requirements.txt --editable '.[fuzz]'
	@$(BIN)/python -m tests.fuzz $(if $(minutes),--minutes $(minutes)) $(if $(target),--target $(target)) $(if $(cores),--cores $(cores))

clean:  ## remove results (build/) and the site, unless something runs; the environment stays
	@if test -e $(READY); then $(BIN)/python -m lowbit clean; else rm -rf build; fi
	@rm -rf site

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  \1\t/' | expand -t 18

$(READY): requirements.txt pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@mkdir -p .venv/lint/lowbit  # the package as one tree, for tools that read files and import nothing
	@ln -sfn ../../../lowbit/__init__.py .venv/lint/lowbit/__init__.py
	@ln -sfn ../../../lowbit/__main__.py .venv/lint/lowbit/__main__.py
	@ln -sfn ../../../passes .venv/lint/lowbit/passes
	@ln -sfn ../../../pipeline .venv/lint/lowbit/pipeline
	@touch $(READY)
