"""Print the path of the plugin file for --external_plugins; with --write, of a copy to add your own classes to."""

from __future__ import annotations

import argparse
from pathlib import Path

from treepo_swift.plugin import FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--write', type=Path, metavar='FILE', help='copy the plugin file here and print that path')


def run(args: argparse.Namespace) -> int:
    if args.write is None:
        print(FILE)
        return 0
    target, content = args.write.resolve(), FILE.read_text()
    if target.stem in ('treepo_swift', 'plugin'):
        print(f'{target.name}: this name would hide a package of the same name from Python; try treepo_plugin.py.')
        return 1
    if target.exists() and target.read_text() != content:
        print(f'{target} exists and holds something else; nothing was written.')
        return 1
    target.write_text(content)
    print(target)
    return 0
