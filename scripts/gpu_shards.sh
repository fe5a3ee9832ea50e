#!/usr/bin/env bash
# Tests in several processes where pytest-xdist is missing:
#   gpu_shards.sh PROCESSES FOLDER python -m pytest OPTIONS... -- SELECTION...
# Collects once, deals the tests out one by one, and adds up the exit statuses. Logs and lists land in FOLDER.
set -um # each process in a group of its own, or it would ignore interrupts
count=$1 folder=$2
shift 2
command=()
while [ "$1" != -- ]; do command+=("$1"); shift; done
shift
mkdir -p "$folder"
"${command[@]}" --collect-only -q "$@" >"$folder/collected.txt" 2>&1
grep '::' "$folder/collected.txt" >"$folder/all.txt" || { tail -30 "$folder/collected.txt"; exit 3; }
split -d -n "r/$count" "$folder/all.txt" "$folder/shard."
pids=()
trap 'kill -INT "${pids[@]}" 2>/dev/null; (sleep 7; kill -KILL "${pids[@]}" 2>/dev/null) &' INT TERM
for list in "$folder"/shard.??; do
    [ -s "$list" ] || continue
    "${command[@]}" -rfE "@$list" >"$list.log" 2>&1 &
    pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do
    wait "$pid" || failed=1
    while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done # where a signal ended the waiting
done
cat "$folder"/shard.??.log
exit $failed
