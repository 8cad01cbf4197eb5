"""Every Python example of the docs runs, and prints what the page says that it prints."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

import pytest

import treepo_swift

pytest.importorskip('swift')

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r'^```python\n(.*?)^```(?:\s*prints\s*```text\n(.*?)^```)?', re.DOTALL | re.MULTILINE)
DOCS = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
PAGES = [page for page in DOCS if BLOCK.search(page.read_text())]


def run(code: str, folder: Path) -> None:
    """The whole life of a process: what it prints goes to files in `folder`, where it runs."""
    os.chdir(folder)
    for number, name in ((1, 'out'), (2, 'err')):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    try:
        exec(code, {'__name__': '__main__'})
    except BaseException:
        traceback.print_exc()
        raise


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_examples_run(page, tmp_path, loaded):
    for code, printed in BLOCK.findall(page.read_text()):
        process = loaded.Process(target=run, args=(code, tmp_path))
        process.start()
        process.join(240)
        process.kill()
        assert process.exitcode == 0, (tmp_path / 'err').read_text()[-2000:]
        assert not printed or (tmp_path / 'out').read_text() == printed


def test_links_between_pages_lead_somewhere():
    for page in (*DOCS, *(ROOT / 'examples').rglob('*.md')):
        for target in re.findall(r'\]\((?!https?:|#)([^)#]+)', page.read_text()):
            assert (page.parent / target).exists(), f'{page.name}: {target}'


def test_files_that_pages_name_are_there():
    for page in DOCS:
        for name in re.findall(r'`((?:treepo_swift|tests|docs|scripts|plugin)/[\w./-]*)`', page.read_text()):
            path = ROOT / name
            assert path.exists() or path.with_suffix('.py').exists(), f'{page.name}: {name}'


def test_every_fault_of_the_reliability_page_has_a_test():
    page = (ROOT / 'docs' / 'reliability.md').read_text()
    lines = page.partition('## Faults')[2].partition('\n## ')[0].splitlines()
    rows = [line.split(' | ') for line in lines if line.startswith('| ') and '---' not in line][1:]
    assert len(rows) > 40
    for row in rows:
        assert len(row) == 5 and all(cell.strip(' |') for cell in row), row
        file, _, test = row[-1].strip(' |`').partition('::')
        assert any(f'def {test}(' in path.read_text() for path in (ROOT / 'tests').rglob(f'{file}.py')), row[-1]


def test_modules_that_the_docs_name_exist():
    for page in (*DOCS, *(ROOT / 'examples').rglob('*.md')):
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
