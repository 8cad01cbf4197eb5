#!/usr/bin/env bash
# Lint, format and types, as CI and the pre-commit hooks want them: `bash scripts/check.sh`, or only `lint`, `format` or `types`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3

lint() { "$python" -m ruff check --quiet; }
format() { "$python" -m ruff format --check --quiet; }
types() { "$python" -m mypy; }

for check in "${@:-all}"; do
    case $check in
        lint | format | types) "$check" ;;
        all) lint && format && types ;;
        *) echo "$check is no check: they are lint, format and types" >&2 && exit 2 ;;
    esac
done
