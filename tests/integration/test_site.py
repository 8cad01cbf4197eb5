"""The documentation builds as a site: no link leads nowhere, and an opened page fetches nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_site_builds_and_fetches_nothing():
    result = subprocess.run(['bash', str(ROOT / 'scripts' / 'site.sh')], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    site = ROOT / 'output' / 'site'
    pages = sorted(site.rglob('*.html'))
    assert len(pages) > 25
    for page in pages:
        loaded = re.findall(
            r'<(?:script|img|iframe|link rel="stylesheet")[^>]+(?:src|href)="(https?:[^"]+)', page.read_text()
        )
        assert loaded == [], page
    # A folder of scripts that a page links to is a page that shows them.
    recipe = (site / 'examples' / 'recipes' / 'two_gpus' / 'files' / 'index.html').read_text()
    assert 'multi_turn_scheduler' in recipe and 'tree.yaml' in recipe
    # Every public name has its place on the API page.
    import treepo_swift

    api = (site / 'api' / 'index.html').read_text()
    assert [name for name in treepo_swift.__all__ if f'.{name}"' not in api] == []
