#!/usr/bin/env bash
# Runs one command of this project on all workers of a Cloud TPU slice, and again after preemptions.
#   bash launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v5litepod-16 [--spot] [--project=PROJECT] \
#     [--version=tpu-ubuntu2204-base] [--delete] [--print] \
#     -- launch.train --config=configs/lightningdit_xl_64ep.py --config.mesh.fsdp=-1 \
#        --config.mesh.data=1 --workdir=gs://BUCKET/xl_64ep
#   bash launch/tpu_pod.sh --name=NAME --zone=ZONE --logs      # follows the running command
#   bash launch/tpu_pod.sh --name=NAME --zone=ZONE --stop      # SIGTERM: it saves a checkpoint and ends
#   bash launch/tpu_pod.sh --name=NAME --zone=ZONE --delete    # deletes the slice
# Creates the queued resource NAME, or uses the existing one; copies the committed code to its workers
# and installs it; runs what follows -- on all of them as `python -m ...`, independent of this connection.
# The same command again follows the one that runs; another is refused while it runs.
# When the slice is preempted, requests it again, and the same command resumes from its last checkpoint, or
# with what is missing of samples and figures: give it a --workdir, or an --output, in a bucket (gcsfs is
# installed for it). --delete with a command deletes the slice after the command succeeded. --print shows
# the gcloud commands without running them.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

name="" zone="" type="" project="" version=tpu-ubuntu2204-base
spot="" delete="" print="" logs="" stop=""
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=1 ;;
    --delete) delete=1 ;;
    --print) print=1 ;;
    --logs) logs=1 ;;
    --stop) stop=1 ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --)
      shift
      break
      ;;
    *)
      echo "error: unknown option $1; see --help" >&2
      exit 2
      ;;
  esac
  shift
done

fail() {
  echo "error: $*" >&2
  exit 2
}

[ -n "$name" ] || fail "--name=NAME of the slice is missing; see --help"
[ -n "$zone" ] || fail "--zone=ZONE is missing, such as us-west4-a; see --help"
[ $# -gt 0 ] || [ -n "$logs$stop$delete" ] || fail "no command: give -- launch.train ...; see --help"
[ -z "$stop" ] || [ -z "$delete" ] ||
  fail "--stop saves a checkpoint, which takes a while: --delete when --logs shows that it has ended"
[ $# -eq 0 ] || [ -n "$type" ] || fail "--type is missing, such as v5litepod-16; see --help"
[ -n "$print" ] || command -v gcloud >/dev/null || fail "gcloud is not installed; --print works without"

place=(--zone="$zone")
[ -z "$project" ] || place+=(--project="$project")

# call WORDS...: runs a gcloud command, or shows it with --print.
call() {
  if [ -n "$print" ]; then
    printf '%q ' gcloud "$@"
    echo
  else
    gcloud "$@"
  fi
}

# on WORKER COMMAND: runs a shell command on one worker, or on all.
on() {
  call compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"
}

# The queued resource's state; NONE if it does not exist, UNKNOWN if gcloud fails.
state() {
  local answer
  if [ -n "$print" ]; then
    echo "$assumed"
  elif answer=$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    --format='value(state.state)' 2>&1); then
    echo "$answer"
  elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
    echo NONE
  else
    echo "$answer" >&2
    echo UNKNOWN
  fi
}

pause() {
  sleep "${SECONDS_BETWEEN_LOOKS:-30}"
}

give_back() {
  call compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
  assumed=NONE
}

# Returns when the slice is active.
acquire() {
  local options=(--node-id="$name" --accelerator-type="$type" --runtime-version="$version")
  [ -z "$spot" ] || options+=(--spot)
  local now
  while true; do
    now=$(state)
    case $now in
      ACTIVE) return ;;
      NONE)
        echo "asking for $type as $name"
        call compute tpus queued-resources create "$name" "${place[@]}" "${options[@]}"
        assumed=ACTIVE
        ;;
      SUSPENDED | SUSPENDING)
        echo "$name was taken away; asking for it anew"
        give_back
        pause
        ;;
      FAILED)
        gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='yaml(state)' >&2
        fail "$name cannot be had, see above; --delete it before you ask for another"
        ;;
      *) echo "$name is $now ($(date +%T))" && pause ;;
    esac
  done
}

# Installs the committed code on all workers that do not have it yet.
install() {
  local commit archive
  commit=$(git -C "$root" rev-parse --short HEAD)
  [ -z "$(git -C "$root" status --porcelain)" ] ||
    echo "warning: changes that are not committed stay here; commit $commit is what runs" >&2
  archive=$(mktemp -d)/vavae.tar.gz
  git -C "$root" archive --format=tar.gz --output="$archive" HEAD
  call compute tpus tpu-vm scp "$archive" "$name": "${place[@]}" --worker=all || return 1
  rm -r "$(dirname "$archive")"
  # The images have only Python 3.10.
  on all "set -e; [ \"\$(cat vavae/commit 2>/dev/null)\" != $commit ] || exit 0
    command -v python3.11 >/dev/null || { sudo apt-get -qq update; sudo apt-get -qq install -y python3.11-venv; }
    mkdir -p vavae; tar xzf vavae.tar.gz -C vavae; cd vavae
    export PYTHON=python3.11 ACCELERATOR=tpu; . launch/environment.sh; prepare_environment gcs; echo $commit >commit"
}

# What must hold on a worker where a command runs, and where the last one was this one.
alive="[ -f run.pid ] && [ ! -f run.code ] && kill -0 \$(cat run.pid) 2>/dev/null"
command=$(printf ' %q' "$@")
command=${command# }
ours="[ \"\$(cat run.command)\" = $(printf '%q' "$command") ]"

# The command that runs on the first worker; empty if none does. Fails when the worker is gone.
running() {
  [ -n "$print" ] || on 0 "cd vavae 2>/dev/null && $alive || exit 0
    cat run.command 2>/dev/null || echo 'what an earlier version of this script began'"
}

# Installs before the command begins; nothing where it runs already.
ready() {
  case $now in
    "") install ;;
    "$command") ;;
    *) fail "$name runs: $now; --logs follows it, --stop ends it" ;;
  esac
}

# Starts the command on all workers, unless it runs; each keeps it, its output and exit code.
begin() {
  local line=".venv/bin/python -m $command; echo \$? >run.code"
  on all "cd vavae; if $alive; then $ours; exit; fi
    rm -f run.code stopped; echo $(printf '%q' "$command") >run.command
    DISTRIBUTED=1 nohup bash -c $(printf '%q' "$line") >>run.log 2>&1 </dev/null &
    echo \$! >run.pid"
}

# Shows the first worker's output until its command ends; fails when the worker is gone.
follow() {
  on 0 "cd vavae; tail -n 20 --pid=\$(cat run.pid) -F run.log"
}

# The exit code of the command on the first worker; empty while it runs, if it was killed, or if
# another was begun since.
code() {
  if [ -n "$print" ]; then echo 0; else on 0 "cd vavae; $ours && cat run.code" 2>/dev/null || true; fi
}

assumed=NONE
if [ $# -eq 0 ]; then
  [ -z "$logs" ] || follow
  # Signals the interpreter, not the shell that waits for it.
  [ -z "$stop" ] || on all "touch vavae/stopped; pkill -TERM -P \$(cat vavae/run.pid)" ||
    fail "nothing runs on $name"
  [ -z "$delete" ] || give_back
  exit 0
fi

misses=0
while true; do
  acquire
  if ! { now=$(running) && ready && begin; }; then
    misses=$((misses + 1))
    [ $misses -lt 5 ] || fail "the workers of $name cannot be reached or installed, see above"
    echo "the workers cannot be reached; looking again"
    pause
    continue
  fi
  misses=0
  follow || echo "the connection or the slice is gone; looking again"
  ended=$(code)
  case $ended in
    0) break ;;
    "" | 143) # the slice was taken away, the connection was lost, or --stop
      if on 0 "test -e vavae/stopped" 2>/dev/null; then
        echo "stopped by --stop; the same command goes on from its checkpoint"
        exit 143
      fi
      pause
      ;;
    *)
      # A worker whose neighbour was taken away fails before the slice is said to be lost.
      pause
      if [ "$(state)" != ACTIVE ]; then
        echo "the slice was lost (code $ended)"
        continue
      fi
      echo "error: the command ended with code $ended; --logs shows its last lines" >&2
      exit "$ended"
      ;;
  esac
  echo "going on with the same command ($(date +%T))"
done
echo "done; its results are where --workdir or --output says"
[ -z "$delete" ] || give_back
