# On a fresh machine with Python 3.11 and make: `make demo` or `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo web test test-flower test-fast test-slow lint format bench bench-published clean

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml requirements-tff.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[all,dev]'
	# TFF has wheels for Linux x86-64 only.
	if [ "$$(uname -sm)" = "Linux x86_64" ]; then $(BIN)/python -m pip install --quiet \
		--no-deps --ignore-requires-python -r requirements-tff.txt; fi
	touch $@

demo: install
	$(BIN)/python examples/quickstart.py

# The page of examples/web_digits.py on http://127.0.0.1:8000. Needs npm.
web: install
	$(BIN)/python examples/web_digits.py

test: install
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile

# For the edit loop: the fastest test files of some folders.
FAST := tests/test_rooms.py tests/test_shown.py tests/tasks/test_tasks.py \
	tests/tasks/test_metrics.py tests/balancing/test_gramian.py \
	tests/model/test_report.py tests/finetuning/test_unfreezing.py \
	tests/multitask/test_mixing.py tests/federated/test_clients.py

test-fast: install
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile $(FAST)

test-slow: install
	$(BIN)/python -m pytest -m slow

# Flower's protobuf is too old for TFDS and tensorflow-text: an environment of its own.
test-flower:
	test -x .venv-flower/bin/python || $(PYTHON) -m venv .venv-flower
	.venv-flower/bin/python -m pip install --quiet --editable '.[flower,federated,phone]' \
		pytest scikit-learn pillow
	.venv-flower/bin/python -m pip install --quiet \
		--no-deps --ignore-requires-python -r requirements-tff.txt
	.venv-flower/bin/python -m pytest tests/federated/fleet

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy keras_lp

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m benchmarks --quick

# Published settings. With TFDS_DATA_DIR; hours on a processor, prepared for a GPU.
bench-published: install
	$(BIN)/python benchmarks/niid.py --published --skews "two labels" --seeds 1
	$(BIN)/python benchmarks/multitask_published.py --seeds 1
	$(BIN)/python benchmarks/mcmahan.py --cases cnn_shards --tuning-rounds 10

clean:
	rm -rf $(VENV) build *.egg-info runs .pytest_cache .ruff_cache .mypy_cache
