#!/usr/bin/env bash
# A browser for the tests of the viewer: does nothing where one is found. It is installed from the distribution where
# this may be done without asking (Debian or Ubuntu, as root); elsewhere the tests say that they are skipped.
set -uo pipefail
for name in chromium chromium-browser google-chrome google-chrome-stable; do
    command -v "$name" >/dev/null && exit 0
done
say() { echo "[browser] $*"; }
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    say 'none here; the tests of the viewer in a browser will be skipped. Install chromium to run them.'
    exit 0
fi
log=$(mktemp)
say "installing chromium (log: $log)"
export DEBIAN_FRONTEND=noninteractive
if { apt-get update && apt-get install -y --no-install-recommends chromium fonts-dejavu-core; } >"$log" 2>&1; then
    say 'ready'
else
    tail -n 3 "$log"
    say 'could not be installed; the tests of the viewer in a browser will be skipped.'
fi
