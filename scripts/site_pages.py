"""Lays the pages of the site out in a folder: README.md, docs/, the READMEs of examples/, and an API page.

    python scripts/site_pages.py output/site_pages

Links stay what they are in the repository. A folder or a file of code that a page links to gets a page that shows it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r'(\]\()(?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)')
LANGUAGES = {'.sh': 'bash', '.py': 'python', '.yaml': 'yaml', '.json': 'json', '.txt': 'text'}
SHOWN = 40_000
"""Characters of a file that a page shows."""


def sources() -> Iterator[Path]:
    yield from (ROOT / name for name in ('README.md', 'CHANGELOG.md', 'CONTRIBUTING.md'))
    yield from sorted((ROOT / 'docs').rglob('*.md'))
    yield from sorted((ROOT / 'examples').rglob('*.md'))


def page_of(path: Path) -> Path:
    """Where a file of the repository stands among the pages."""
    relative = path.relative_to(ROOT)
    return Path('index.md') if relative == Path('README.md') else relative


def code_page(path: Path) -> tuple[Path, str]:
    """A page that shows a file, or the files of a folder."""
    relative = path.relative_to(ROOT)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    parts = [f'# {relative}']
    for file in files:
        language = LANGUAGES.get(file.suffix)
        if language:
            text = file.read_text()
            cut = '\n...' if len(text) > SHOWN else ''
            parts.append(f'## {file.name}\n\n`````{language}\n{text[:SHOWN].rstrip()}{cut}\n`````')
    target = relative / 'files.md' if path.is_dir() else relative.with_name(relative.name + '.md')
    return target, '\n\n'.join(parts) + '\n'


def lay_out(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    pages: dict[Path, str] = {}

    def linked(source: Path, match: re.Match[str]) -> str:
        opening, link, anchor = match[1], match[2], match[3] or ''
        path = (source.parent / link).resolve()
        if not path.is_relative_to(ROOT) or not path.exists():
            return match[0]  # mkdocs says that it leads nowhere
        if path.is_dir() and (path / 'README.md').exists():
            there = page_of(path / 'README.md')
        elif path.suffix == '.md':
            there = page_of(path)
        elif path.suffix in ('.png', '.svg', '.html', '.ipynb'):
            there = path.relative_to(ROOT)
            (target / there).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / there)
        else:
            there, text = code_page(path)
            pages[there] = text
        here = page_of(source).parent
        return f'{opening}{os.path.relpath(there, here)}{anchor})'

    for source in sources():
        pages[page_of(source)] = LINK.sub(lambda match, source=source: linked(source, match), source.read_text())
    sys.path.insert(0, str(ROOT))
    import treepo_swift

    names = '\n\n'.join(f'::: {path_of(name)}' for name in treepo_swift.__all__)
    pages[Path('api.md')] = f'# Python API\n\nThe public names: `from treepo_swift import ...`.\n\n{names}\n'
    for page, text in pages.items():
        (target / page).parent.mkdir(parents=True, exist_ok=True)
        (target / page).write_text(text)


def path_of(name: str) -> str:
    import treepo_swift

    return f'treepo_swift.{treepo_swift._MODULE_OF[name]}.{name}'


if __name__ == '__main__':
    lay_out(Path(sys.argv[1]).resolve())
