"""The notebook runs from top to bottom, and prints what it shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('matplotlib')

NOTEBOOK = Path(__file__).parents[2] / 'examples' / 'notebook' / 'a_tree.ipynb'
RUN = """
import json, sys
import matplotlib
matplotlib.use('Agg')
space = {'__name__': '__main__'}
for cell in json.load(open(sys.argv[1]))['cells']:
    if cell['cell_type'] == 'code':
        exec(''.join(cell['source']), space)
import matplotlib.pyplot as plt
print('figures:', len(plt.get_fignums()))
"""


def test_the_notebook_runs_and_prints_what_it_shows():
    cells = json.loads(NOTEBOOK.read_text())['cells']
    outputs = [output for cell in cells for output in cell.get('outputs', [])]
    shown = ''.join(''.join(output['text']) for output in outputs if output['output_type'] == 'stream')
    pictures = sum('image/png' in output.get('data', {}) for output in outputs)
    assert shown and pictures == 2, 'the notebook was saved without its outputs'
    result = subprocess.run(
        [sys.executable, '-c', RUN, str(NOTEBOOK)], capture_output=True, text=True, cwd=NOTEBOOK.parent, timeout=240
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == f'{shown}figures: {pictures}\n'
