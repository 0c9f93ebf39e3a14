#!/bin/bash
# Before a pod ends: tell Ray that this node goes, so that a run saves and moves on, and wait until it has. SECONDS at most.
# An idle node has nothing to wait for. Usage: pre_stop.sh SECONDS
set -u
seconds=${1:?usage: pre_stop.sh SECONDS}
until=$(($(date +%s) + seconds))
timeout "$seconds" python -m dpa_ray.cluster.draining --message "the pod ends" --deadline-ms "$((until * 1000))"
while [[ $(date +%s) -lt $until ]] && pgrep --full 'ray::[^I]' > /dev/null; do # ray::IDLE waits for work
  sleep 1
done
