"""Say whether this environment, or a command you are about to start, can grow and train on trees, and what to mend."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from treepo_swift.config import TreeConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--json', action='store_true', help='print the findings as JSON')
    parser.add_argument(
        'started',
        nargs=argparse.REMAINDER,
        metavar='-- COMMAND',
        help='look at this command too: -- swift rollout ..., or -- swift rlhf ...',
    )


def run(args: argparse.Namespace) -> int:
    from treepo_swift.lab.doctor import machine, packages
    from treepo_swift.lab.doctor.command import check_command, longest_path
    from treepo_swift.lab.doctor.finding import run_checks

    command = [part for index, part in enumerate(args.started) if index or part != '--']
    checks = [
        *packages.checks(),
        ('memory', machine.memory),
        ('shared memory', machine.shared_memory),
        ('disk', lambda: machine.disk(Path())),
    ]
    checks.append(
        ('command', lambda: check_command(command))
        if command
        else ('tree config', lambda: longest_path(TreeConfig.load()))
    )
    findings = []
    for finding in run_checks(checks):
        findings.append(finding)
        if not args.json:
            print(finding, flush=True)
    if args.json:
        print(json.dumps([finding.to_dict() for finding in findings], indent=2))
    return 1 if any(finding.status == 'FAIL' for finding in findings) else 0
