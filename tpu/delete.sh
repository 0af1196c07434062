#!/usr/bin/env bash
# Give the pod back, which ends its cost: tpu/delete.sh. Runs and data in the bucket stay.
set -euo pipefail
source "$(dirname "$0")/env.sh"
gcloud_tpu queued-resources delete "$NAME" --force --quiet
