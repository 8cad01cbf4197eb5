"""Print the path of a plugin file for --external_plugins, writing it first where the package came without one."""

from __future__ import annotations

import argparse
from pathlib import Path

SOURCE = Path(__file__).parents[2] / 'plugin' / 'treepo_plugin.py'
CONTENT = 'from treepo_swift.plugin import register\n\nregister()\n'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--write', type=Path, metavar='FILE', help='write a plugin file here and print its path')


def run(args: argparse.Namespace) -> int:
    if args.write is None and SOURCE.is_file():
        print(SOURCE)
        return 0
    target = (args.write or Path('treepo_plugin.py')).resolve()
    if target.stem in ('treepo_swift', 'plugin'):
        print(f'{target.name}: this name would hide a package of the same name from Python; try treepo_plugin.py.')
        return 1
    if target.exists() and target.read_text() != CONTENT:
        print(f'{target} exists and holds something else; nothing was written.')
        return 1
    target.write_text(CONTENT)
    print(target)
    return 0
