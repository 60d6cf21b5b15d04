#!/usr/bin/env bash
# Stands for gcloud in tests of launch/tpu_pod.sh: a slice of two workers, folders of $FAKE; what is
# run on a worker runs in its folder. $FAKE/state is the queued resource's, $FAKE/calls what was asked.
set -u
echo "$*" >>"$FAKE/calls"
worker=all command=""
for word in "$@"; do
  case $word in
    --worker=*) worker=${word#*=} ;;
    --command=*) command=${word#*=} ;;
  esac
done
case "$*" in
  *"queued-resources describe"*)
    if [ ! -f "$FAKE/state" ]; then
      echo "NOT_FOUND: no such resource" >&2
      exit 1
    fi
    cat "$FAKE/state"
    ;;
  *"tpu-vm scp"*)
    # $FAKE/refused: how many more copies fail, as where hosts are going away.
    left=$(cat "$FAKE/refused" 2>/dev/null || echo 0)
    if [ "$left" -gt 0 ]; then
      echo $((left - 1)) >"$FAKE/refused"
      [ ! -f "$FAKE/lost" ] || mv "$FAKE/lost" "$FAKE/state"
      exit 1
    fi
    ;;
  *"queued-resources create"*)
    for i in 0 1; do
      mkdir -p "$FAKE/$i/vavae/.venv/bin"
      echo "$COMMIT" >"$FAKE/$i/vavae/commit" # installed already
      cp "$FAKE/python" "$FAKE/$i/vavae/.venv/bin/python"
    done
    echo ACTIVE >"$FAKE/state"
    ;;
  *"queued-resources delete"*) rm -rf "$FAKE/0" "$FAKE/1" "$FAKE/state" ;;
  *"tpu-vm ssh"*)
    [ "$worker" = all ] && worker="0 1"
    code=0
    for i in $worker; do
      (cd "$FAKE/$i" 2>/dev/null && bash -c "$command") || code=$?
    done
    exit $code
    ;;
esac
