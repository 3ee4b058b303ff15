#!/usr/bin/env bash
# A black box over HTTP: a reward that is served by one process and asked by another. Arguments go to `tiltflow train`.
set -euo pipefail
cd "$(dirname "$0")"

tiltflow serve-reward served.yaml --port 8777 --allow-code &
trap 'kill $!' EXIT

tiltflow train holes.yaml --output ../../runs/holes "$@"
