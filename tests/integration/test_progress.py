"""What is logged while a progress bar runs, on a real terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

pytest.importorskip('swift')
pytest.importorskip('vllm')

CODE = """
import logging, sys
from types import SimpleNamespace
import vllm.logger
from swift.utils import get_logger
from treepo_swift.lab.sampling.growing import Plan, grow_missing

class Sampler:
    def grow(self, rows, sampling, judge):
        get_logger().warning('swift says')
        logging.getLogger('vllm.engine').warning('vllm says')
        logging.getLogger('treepo_swift.lab').warning('we say')
        return []

rows = [SimpleNamespace(key=index) for index in range(3)]
file = SimpleNamespace(done=[], append=lambda trees: None)
grow_missing(Sampler(), rows, [Plan('sample', None, file)], None, batch=1)
get_logger().warning('swift says later')
print('the result')
"""


def on_terminal(code: str) -> str:
    """All that a process writes to a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 100, 0, 0))
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, '-c', code], stdout=theirs, stderr=theirs, cwd=root, env={**os.environ, 'PYTHONPATH': root}
    )
    os.close(theirs)
    said = b''
    try:
        while chunk := os.read(ours, 65536):
            said += chunk
    except OSError:
        pass  # the other end is closed
    os.close(ours)
    assert process.wait(60) == 0, said.decode()
    return said.decode()


def screen(said: str) -> list[str]:
    """The lines that stand there in the end: a carriage return begins to write over a line."""
    lines = []
    for line in said.replace('\r\n', '\n').split('\n'):
        shown: list[str] = []
        for part in line.split('\r'):
            shown[: len(part)] = part
        lines.append(''.join(shown).rstrip())
    return lines


def test_log_lines_stand_above_a_progress_bar_and_the_result_below():
    lines = screen(on_terminal(CODE))
    for said in ('swift says', 'vllm says', 'we say', 'swift says later'):
        found = [line for line in lines if line.endswith(said)]
        assert len(found) == (1 if said.endswith('later') else 3), (said, lines)
        assert not [line for line in found if 'sample:' in line or 'tree' in line.replace('treepo', '')], lines
    bars = [index for index, line in enumerate(lines) if '%|' in line]
    assert len(bars) == 1 and '3/3' in lines[bars[0]], lines
    assert lines[bars[0] + 1].endswith('swift says later') and lines[bars[0] + 2 :] == ['the result', '']


def test_a_screen_is_read_as_a_terminal_shows_it():
    assert screen('  0%|  |\rlog line\n\r      \rdone\r\nresult\n') == ['log line', 'done', 'result', '']
