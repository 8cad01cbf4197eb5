"""Show trees that a training wrote: one HTML file to open in a browser, or --terminal."""

from __future__ import annotations

import argparse
import json
import webbrowser
from pathlib import Path

from treepo_swift.view.files import TreesError, load
from treepo_swift.view.page import describe, html
from treepo_swift.view.terminal import print_trees
from treepo_swift.wire.record import TreeRecord


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('path', type=Path, metavar='FILE|RUN_DIR', help='a .jsonl file, or the --output_dir of a run')
    parser.add_argument('--output', type=Path, metavar='HTML', help='where to write (default: trees.html beside them)')
    parser.add_argument('--no-json', action='store_true', help='do not write the JSON twin of the page')
    parser.add_argument('--open', action='store_true', help='open the page in a browser')
    parser.add_argument('--terminal', action='store_true', help='print trees here instead')
    parser.add_argument('--tree', metavar='ID', help='only the trees whose id begins so')
    parser.add_argument('--step', type=int, help='only the trees of this step')
    parser.add_argument('--last', type=int, metavar='N', help='only the last N trees (--terminal: 1 where not given)')


def run(args: argparse.Namespace) -> int:
    records = _chosen(load(args.path), args)
    if args.terminal:
        print_trees(records if args.last or args.tree else records[-1:])
    else:
        _write(records, args)
    return 0


def _write(records: list[TreeRecord], args: argparse.Namespace) -> None:
    target: Path = args.output or (args.path if args.path.is_dir() else args.path.parent) / 'trees.html'
    described = describe(records, str(args.path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open('w', encoding='utf-8', errors='replace', newline='') as file:
        file.writelines(html(described))
    print(f'{len(records)} trees: {target} ({target.stat().st_size / 1e6:.1f} MB)')
    if not args.no_json:
        twin = target.with_suffix('.json')
        twin.write_text(json.dumps(described, separators=(',', ':')))
        print(f'the same as JSON: {twin} ({twin.stat().st_size / 1e6:.1f} MB)')
    if args.open:
        webbrowser.open(target.resolve().as_uri())


def _chosen(records: list[TreeRecord], args: argparse.Namespace) -> list[TreeRecord]:
    chosen = [
        record
        for record in records
        if (args.tree is None or record.tree.startswith(args.tree)) and (args.step is None or record.step == args.step)
    ]
    if records and not chosen:
        steps = f'{records[0].step} to {records[-1].step}'
        raise TreesError(f'None of the {len(records)} trees of {args.path} (steps {steps}) is asked for.')
    return chosen[-args.last :] if args.last else chosen
