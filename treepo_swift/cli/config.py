"""Check the tree config of this shell (TREEPO_CONFIG, TREEPO_* variables) and print it resolved."""

from __future__ import annotations

import argparse
import json
import sys

from treepo_swift.config import ConfigError, TreeConfig, reference, schema


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--reference', action='store_true', help='print the documentation of every key instead')
    what.add_argument('--schema', action='store_true', help='print the JSON Schema instead, for editors')


def run(args: argparse.Namespace) -> int:
    if args.reference:
        print(reference(), end='')
        return 0
    if args.schema:
        print(json.dumps(schema(), indent=2))
        return 0
    try:
        print(TreeConfig.load().to_yaml(), end='')
    except ConfigError as e:
        print(f'treepo-swift: {e}', file=sys.stderr)
        return 1
    return 0
