#!/usr/bin/env bash
# Install the committed state of this repository on every host: tpu/setup.sh
# Safe to repeat; a host that has the environment already only gets the new code.
set -euo pipefail
source "$(dirname "$0")/env.sh"
root=$(cd "$(dirname "$0")/.." && pwd)

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$root" archive --format=tar.gz --output="$archive" HEAD
for node in $(nodes); do
  gcloud_tpu tpu-vm scp "$archive" "$node:mor_jax.tar.gz" --worker=all
done

on_all_hosts "set -e
  mkdir -p mor_jax && tar -xzf mor_jax.tar.gz -C mor_jax && cd mor_jax
  python3 -m pip install --quiet --user uv
  test -d .venv || python3 -m uv venv --quiet --python $PYTHON .venv
  python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu,gcs]'
  .venv/bin/python -c 'import jax, libtpu; print(jax.__version__)'"
echo "installed on all hosts of $(nodes | tr '\n' ' ')"
