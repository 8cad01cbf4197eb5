"""Builds what is uploaded, from a copy of what belongs to it: a build leaves files beside the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def build(folder: Path, *options: str) -> list[Path]:
    """The archives that `python -m build` makes in `folder`, the wheel first."""
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / 'treepo_swift', folder / 'treepo_swift', ignore=shutil.ignore_patterns('__pycache__'))
    command = [sys.executable, '-m', 'build', '--no-isolation', *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return sorted((folder / 'dist').iterdir(), key=lambda path: path.suffix != '.whl')
