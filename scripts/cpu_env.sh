#!/usr/bin/env bash
# Creates .venv with everything that the quickstart and the tests need on a machine without a GPU. Does nothing
# when it is there and the dependencies in pyproject.toml have not changed. PYTHON=python3.11 chooses the interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
# Without the settings of ruff, mypy and pytest, which come last.
stamp=$venv/.installed-$(sed '/^\[tool\./,$d' "$root/pyproject.toml" | cksum | tr -d ' ')
[ -f "$stamp" ] && exit 0

say() { echo "[environment] $*"; }
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { say "$python is $("$python" --version 2>&1): Python 3.11 or newer is needed (set PYTHON=...)"; exit 1; }
say "installing into $venv; this takes a few minutes and downloads about 1 GB (log: $venv/install.log)"
"$python" -m venv "$venv"
log=$venv/install.log
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@" >>"$log" 2>&1 || { tail -n 20 "$log"; say "failed; the whole log: $log"; exit 1; }; }
say '1/4 torch'
pip install torch==2.13.0
say '2/4 ms-swift, vLLM (CPU build), test tools'
pip install -e "$root[cpu,deepspeed,dev]"
# Their builds want CUDA, and transformers imports torchvision where it finds it.
say '3/4 removing torchvision, torchaudio, torchcodec'
pip uninstall -y torchvision torchaudio torchcodec
say '4/4 checking'
"$venv/bin/treepo-swift" doctor >"$log.doctor" 2>&1 || { cat "$log.doctor"; exit 1; }
touch "$stamp"
say 'ready'
