# shellcheck shell=bash
# What every script here needs to know; source it, or let the scripts do so. Set the first five in your shell.
#
#   PROJECT  cloud project                    ZONE    such as us-west4-a
#   NAME     name of the pod, free to choose  BUCKET  gs://... for runs and data
#   TYPE     v5litepod-256, v5p-128 (counts cores), v6e-64

: "${PROJECT:?set PROJECT, ZONE, NAME, TYPE and BUCKET (see tpu/README.md)}"
: "${ZONE:?set ZONE}" "${NAME:?set NAME}" "${TYPE:?set TYPE}" "${BUCKET:?set BUCKET}"
SLICES=${SLICES:-1}    # more than one: Multislice, joined by the data-center network
SPOT=${SPOT:-0}        # 1: cheaper, may be taken away at any time; the supervisor resumes
PYTHON=${PYTHON:-3.12} # stock images ship 3.10, which is too old
WAIT=${WAIT:-86400}    # seconds that create.sh waits for capacity

case $TYPE in
v5litepod-*) GENERATION=v5e RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} ;;
v5p-*) GENERATION=v5p RUNTIME=${RUNTIME:-v2-alpha-tpuv5} ;;
v6e-*) GENERATION=v6e RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} ;;
*)
  echo "TYPE=$TYPE is not v5litepod-N, v5p-N or v6e-N (TPU7x: use tpu/jobset.yaml)" >&2
  exit 2
  ;;
esac
export GENERATION RUNTIME SLICES SPOT PYTHON WAIT

gcloud_tpu() { gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }

# Names of the slices: NAME, or NAME-0 .. NAME-(SLICES-1).
nodes() {
  if [[ $SLICES == 1 ]]; then
    echo "$NAME"
  else
    seq -f "$NAME-%g" 0 $((SLICES - 1))
  fi
}

# Run a command on every host of every slice; fails if one fails.
on_all_hosts() {
  local node pids=() failed=0
  for node in $(nodes); do
    gcloud_tpu tpu-vm ssh "$node" --worker=all --command="$1" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return $failed
}
