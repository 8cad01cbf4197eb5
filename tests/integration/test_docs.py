"""Every Python example of the docs runs, and prints what the page says that it prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import treepo_swift

pytest.importorskip('swift')

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r'^```python\n(.*?)^```(?:\s*prints\s*```text\n(.*?)^```)?', re.DOTALL | re.MULTILINE)
PAGES = [page for page in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))) if BLOCK.search(page.read_text())]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_examples_run(page, tmp_path):
    for code, printed in BLOCK.findall(page.read_text()):
        result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-2000:]
        assert not printed or result.stdout == printed


def test_links_between_pages_lead_somewhere():
    for page in (ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'), *(ROOT / 'examples').rglob('*.md')):
        for target in re.findall(r'\]\((?!https?:|#)([^)#]+)', page.read_text()):
            assert (page.parent / target).exists(), f'{page.name}: {target}'


def test_modules_that_the_docs_name_exist():
    pages = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'), *(ROOT / 'examples').rglob('*.md')]
    for page in pages:
        text = page.read_text()
        for path in re.findall(r'\btreepo_swift/[\w/]+(?:\.py)?', text):
            assert (ROOT / path).exists(), f'{page.name}: {path}'
        for name in re.findall(r'\btreepo_swift((?:\.\w+)+)', text):
            parts = name.strip('.').split('.')
            while parts and not (ROOT / 'treepo_swift' / Path(*parts)).with_suffix('.py').exists():
                if (ROOT / 'treepo_swift' / Path(*parts)).is_dir():
                    break
                parts.pop()
            public = name.strip('.').split('.')[0] in treepo_swift.__all__
            assert parts or public, f'{page.name}: treepo_swift{name}'
