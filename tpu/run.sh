#!/usr/bin/env bash
# Start, watch and stop a run on every host:
#   tpu/run.sh smoke                          the smoke test: hosts, network, bucket
#   tpu/run.sh start PRESET [--field value]   train under the supervisor, detached
#   tpu/run.sh log                            follow the first host's log
#   tpu/run.sh stop                           save on all hosts at one step, and end
set -euo pipefail
source "$(dirname "$0")/env.sh"

what=${1:-}
if [[ $what == "" ]]; then
  sed -n '2,6s/^# //p' "$0" >&2
  exit 2
fi
shift
case $what in
smoke)
  on_all_hosts "cd mor_jax && .venv/bin/python tpu/smoke.py $BUCKET"
  ;;
start)
  flags=$(printf ' %q' "$@" --train.runs "$BUCKET/runs")
  # setsid and the redirections let the command outlive the ssh session
  on_all_hosts "cd mor_jax && GENERATION=$GENERATION setsid nohup tpu/supervise.sh train$flags >> ~/mor.log 2>&1 < /dev/null &"
  echo "started; tpu/run.sh log follows it"
  ;;
log)
  gcloud_tpu tpu-vm ssh "$(nodes | head -n 1)" --worker=0 --command="tail -n 50 -F mor.log"
  ;;
stop)
  on_all_hosts "pkill -TERM -o -f tpu/supervise.sh || true"
  ;;
*)
  echo "$what is not one of smoke, start, log, stop" >&2
  exit 2
  ;;
esac
