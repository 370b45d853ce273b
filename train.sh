#!/usr/bin/env bash
# Trains: makes the environment on the first call, then hands over to `simpletuner train`.
#
#   bash train.sh                          # config/config.json
#   ENV=name bash train.sh                 # config/name/config.json
#   ENV=examples/emoji bash train.sh       # an example
#   bash train.sh --learning_rate 5e-5     # a setting for this run only
#
# Settings may also come from the environment (CONFIG_BACKEND, TRAINER_EXTRA_ARGS …).
set -euo pipefail
cd "$(dirname "$0")" # relative paths in a configuration start here

python=$(scripts/setup.sh)

# Threads that sleep at once where they wait halve the speed of a small model on a CPU; threads that
# spin for long slow each other down tenfold where the CPU is busy.
if [ -z "${OMP_WAIT_POLICY:-}" ]; then
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000}
fi

# In place of this shell, so that signals reach the trainer and its exit code is ours.
exec "$python" -m simpletuner train "$@"
