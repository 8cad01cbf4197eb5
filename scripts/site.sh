#!/usr/bin/env bash
# Builds the documentation as a site into output/site, in an environment of its own. A link that leads nowhere fails.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=$root/output/site_venv
[ -x "$venv/bin/mkdocs" ] || {
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet "mkdocs>=1.6,<2" "mkdocs-material>=9.7,<10" "mkdocstrings[python]>=1,<2"
}
"$venv/bin/python" scripts/site_pages.py output/site_pages
exec "$venv/bin/mkdocs" build --strict --quiet "$@"
