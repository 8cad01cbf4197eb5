#!/usr/bin/env bash
# Integration tests with the oldest ms-swift that is supported, laid over the environment of scripts/cpu_env.sh:
# ms-swift is plain Python, so a second version needs no second environment. Arguments go to pytest; without any, the tests
# that go through swift's own code run.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
version=4.5.3
folder=$root/output/versions/ms-swift-$version
cd "$root"
[ $# -gt 0 ] || set -- -q tests/integration/test_{arguments,async_failures,colocate,scheduler,servers,swift_methods}.py \
    tests/integration/test_{swift_schedulers,trainer,turn_tokens,turns,two_ranks,vllm_engine}.py
[ -d "$folder/swift" ] || .venv/bin/python -m pip install --quiet --no-deps --target "$folder" "ms-swift==$version"
found=$(PYTHONPATH=$folder .venv/bin/python -c 'import importlib.metadata as m; print(m.version("ms-swift"))')
[ "$found" = "$version" ] || { echo "ms-swift $found was found instead of $version" >&2; exit 1; }
echo "ms-swift $version over the environment:"
exec env CI=true PYTHONPATH="$folder:$root" .venv/bin/python -m pytest -p no:cacheprovider "$@"
