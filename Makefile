# Each target makes its environment on the first call, as train.sh does.
.PHONY: test test-gpu check docs

# A process for each processor, eight at most, and a whole module to one of them. Two OpenMP threads
# that wait for each other on a busy machine are ten times slower than one.
test: export OMP_NUM_THREADS := 1
test: export OMP_WAIT_POLICY := PASSIVE
test:
	@python=$$(scripts/setup.sh test) && "$$python" -m pytest --dist loadscope \
		-n "$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)" --maxprocesses 8

# One process: the tests share the device.
test-gpu: export SIMPLETUNER_TEST_GPU := 1
test-gpu:
	@python=$$(scripts/setup.sh test) && "$$python" -m pytest -m gpu tests/gpu

check:
	@python=$$(scripts/setup.sh test) && \
	"$$python" -m ruff format --check . && \
	"$$python" -m ruff check . && \
	"$$python" -m mypy && \
	"$$python" -m simpletuner.apps.docgen --check && \
	"$$python" -m pytest tests/architecture

docs:
	@python=$$(scripts/setup.sh test) && "$$python" -m simpletuner.apps.docgen && \
	"$$python" -m tests.resume_table
