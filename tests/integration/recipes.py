"""The commands of a script as bash expands them, and what ms-swift's own argument classes make of their flags."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

RECORDER = """#!{python}
import json, os, sys
name = os.path.basename(sys.argv[0])
if name == 'treepo-swift':
    print('treepo_plugin.py')
else:
    with open(os.environ['RECORDED'], 'a') as file:
        names = ('TREEPO_CONFIG', 'NPROC_PER_NODE', 'NNODES', 'CUDA_VISIBLE_DEVICES')
        env = {{name: os.environ[name] for name in names if name in os.environ}}
        file.write(json.dumps([name, sys.argv[1:], env]) + '\\n')
"""
"""Stands where `swift` stands in PATH, and writes down how it was called."""


class Command(NamedTuple):
    program: str
    """`swift` or `megatron`."""
    verb: str
    flags: list[str]
    env: dict[str, str]


def commands(script: Path, folder: Path, **env: str) -> list[Command]:
    """What `script` calls, run by bash with `env` in an environment that has recorders instead of ms-swift."""
    bin_folder, recorded = folder / 'bin', folder / 'recorded'
    bin_folder.mkdir(exist_ok=True)
    recorded.write_text('')
    for name in ('swift', 'megatron', 'treepo-swift'):
        (bin_folder / name).write_text(RECORDER.format(python=sys.executable))
        (bin_folder / name).chmod(0o755)
    path = f'{bin_folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    result = subprocess.run(
        ['bash', str(script)],
        env={'PATH': path, 'HOME': str(folder), 'RECORDED': str(recorded), **env},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, f'{script}: {result.stderr}'
    calls = [json.loads(line) for line in recorded.read_text().splitlines()]
    assert calls, f'{script} calls neither swift nor megatron'
    return [Command(program, argv[0], argv[1:], seen) for program, argv, seen in calls]


@functools.cache
def _parser(arguments: type) -> Any:
    from transformers import HfArgumentParser

    return HfArgumentParser([arguments])


def parse(arguments: type, flags: list[str]) -> Any:
    """The flags as `arguments` reads them, without what it does then (load a model's config, connect)."""
    known, unknown = _parser(arguments).parse_known_args(flags)
    assert not unknown, f'{arguments.__name__} does not know {unknown}'
    return known
