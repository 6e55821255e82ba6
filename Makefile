# The two commands: `make demo` and `make test`. Each sets up .venv from constraints.txt first.
PYTHON ?= python3
BIN := .venv/bin

# Python keeps what it compiled, pytest's checked tests among it: seconds of every process.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo web test test-web prove thorough check bench setup clean

demo: .venv/.ready
	$(BIN)/tunesmith demo

test: .venv/.ready  # PROOFS=1 runs the slower proofs in the same go, as CI does
	$(BIN)/pytest $(if $(PROOFS),-m 'not thorough and not web') --numprocesses auto --dist worksteal

web: .venv/.ready  # the workbench on the shipped example, at an address that it prints
	$(BIN)/tunesmith web --dataset example:sql

test-web: .venv/.ready  # the workbench in Chromium; ALL=1 runs the longer cases too; skipped, and said so, without one
	$(BIN)/pytest -m 'web$(if $(ALL),, and not thorough)' -rs tests/ui

prove: .venv/.ready  # the slower proofs that every change has to pass: the commands of README and docs among them
	$(BIN)/pytest -m 'slow and not thorough and not web' --numprocesses auto --dist worksteal

thorough: .venv/.ready  # the demo's figures, what methods learn, further cases of what CI proves, Ray's; also in the browser
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[ray]' || echo 'Without Ray its proofs are skipped.'
	$(BIN)/pytest -m 'thorough and not web' --numprocesses auto --dist worksteal
	$(MAKE) test-web ALL=1

check: .venv/.ready
	scripts/check

bench: .venv/.ready  # hours on a quiet machine; ONLY="startup,freeze" runs some, RESUME=1 what today's lack
	$(BIN)/python benchmarks/run_all.py $(if $(ONLY),--only "$(ONLY)") $(if $(RESUME),--resume)

setup: .venv/.ready

# Without a GPU the CPU build of torch is asked for first. An index that has none under that name gives its
# ordinary build, which is larger and runs on a CPU as well; set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU
# wheels to get the small one.
.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tunesmith needs Python 3.11 or newer; set PYTHON=python3.11 or so")'
	$(PYTHON) -m venv .venv
	@torch=$$(grep '^torch==' constraints.txt); \
	if command -v nvidia-smi >/dev/null 2>&1 || ! $(BIN)/pip install --quiet "$$torch+cpu" 2>/dev/null; then \
		$(BIN)/pip install --quiet "$$torch"; \
	fi
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,tensorboard]'
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
