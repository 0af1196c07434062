#!/usr/bin/env bash
# Run `mor ARGUMENTS` on this host and start it again when it was killed or lost its peers; the run resumes by itself.
# Ends when the run is finished, when a person has to look (bad configuration, divergence), or on SIGTERM, which it hands on.
#
#   MOR        the command (.venv/bin/mor)          GENERATION  whose flags to use (v5e, v5p, v6e, tpu7x)
#   PAUSE      seconds before the first restart (10), doubled up to 5 minutes, reset by an hour of running
#   RESTARTS   restarts in a row that failed within the hour before it gives up (20)
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mor=${MOR:-$here/../.venv/bin/mor}
first=${PAUSE:-10} limit=${RESTARTS:-20}

if [[ -n ${GENERATION:-} ]]; then
  flags=$(grep -v -e '^#' -e '^$' "$here/flags/$GENERATION.env" | tr '\n' ' ') || exit 2
  export LIBTPU_INIT_ARGS="$flags${LIBTPU_INIT_ARGS:-}"
fi
export JAX_COORDINATOR_PORT=${JAX_COORDINATOR_PORT:-8476} # open between the hosts of a pod; others may not be

folder=$(mktemp -d)
last=$folder/last pipe=$folder/pipe
mkfifo "$pipe"
trap 'rm -rf "$folder"' EXIT
child=0 stopping=0
trap 'stopping=$((stopping + 1)); ((child)) && kill -TERM "$child" 2>/dev/null' TERM INT

say() { echo "supervise: $(date -u +%FT%TZ) $*"; }

pause=$first failures=0
while true; do
  say "starting: $mor $*"
  start=$SECONDS
  tee "$last" <"$pipe" &
  copier=$!
  "$mor" "$@" >"$pipe" 2>&1 &
  child=$!
  # a trapped signal interrupts wait: wait again for the child, which saves first
  while true; do
    signals=$stopping
    wait "$child"
    code=$?
    if ((signals == stopping)); then break; fi
  done
  ran=$((SECONDS - start))
  # its last lines decide what to do; a process it left behind may hold the pipe open, so do not wait for ever
  for _ in {1..100}; do
    kill -0 "$copier" 2>/dev/null || break
    sleep 0.1
  done
  if ((stopping)); then
    say "stopped on request after $ran s, exit code $code"
    exit "$code"
  fi
  case $code in
  0)
    # a signal from elsewhere (a preempted host) also ends with 0, and says that there is more to do
    if ! grep -q 'the same command continues' "$last"; then
      say "finished"
      exit 0
    fi
    ;;
  1)
    # divergence ends with 1, but so does a host that lost its peers
    if grep -q 'diverged' "$last"; then
      say "the run diverged: starting again would not help, look at the lines above"
      exit 1
    fi
    ;;
  2)
    say "exit code $code after $ran s: starting again would not help, look at the lines above"
    exit "$code"
    ;;
  esac
  if ((ran > 3600)); then pause=$first failures=0; fi
  failures=$((failures + 1))
  if ((failures > limit)); then
    say "exit code $code, and $limit restarts in a row did not last: giving up"
    exit "$code"
  fi
  say "exit code $code after $ran s: again in $pause s ($failures of $limit)"
  sleep "$pause" &
  wait $!
  if ((stopping)); then exit 143; fi
  pause=$((pause * 2 > 300 ? 300 : pause * 2))
done
