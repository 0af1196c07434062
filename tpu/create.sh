#!/usr/bin/env bash
# Ask for a pod and wait until it is there: tpu/create.sh
# Asking again for a pod that exists only waits for it.
set -euo pipefail
source "$(dirname "$0")/env.sh"

state() { gcloud_tpu queued-resources describe "$NAME" --format='value(state.state)' 2>/dev/null || true; }

if [[ -z $(state) ]]; then
  arguments=(--accelerator-type="$TYPE" --runtime-version="$RUNTIME")
  if [[ $SLICES == 1 ]]; then
    arguments+=(--node-id="$NAME")
  else
    arguments+=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  if [[ $SPOT == 1 ]]; then arguments+=(--spot); fi
  gcloud_tpu queued-resources create "$NAME" "${arguments[@]}"
fi

deadline=$((SECONDS + WAIT))
while true; do
  now=$(state)
  case $now in
  ACTIVE)
    echo "$NAME is there: $SLICES x $TYPE"
    exit 0
    ;;
  FAILED | SUSPENDED | SUSPENDING)
    echo "$NAME is $now: tpu/delete.sh, then ask again (quota, zone, or taken back)" >&2
    exit 1
    ;;
  esac
  if ((SECONDS > deadline)); then
    echo "$NAME is still $now after $WAIT s; it stays queued: run tpu/create.sh again, or tpu/delete.sh" >&2
    exit 1
  fi
  echo "$(date +%T) $NAME: ${now:-not listed yet}"
  sleep 30
done
