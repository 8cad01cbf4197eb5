"""What the package's own code never does, whoever writes to it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = [path for folder in ('treepo_swift', 'plugin', 'examples') for path in sorted((ROOT / folder).rglob('*.py'))]
UNSAFE_MODULES = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'shelve', 'marshal', 'jsonpickle'}
UNSAFE_CALLS = {
    'yaml.load',
    'yaml.load_all',
    'yaml.full_load',
    'yaml.unsafe_load',
    'os.system',
    'torch.load',
    'joblib.load',
    'np.load',
    'numpy.load',
}
SHELLS = {'subprocess.run', 'subprocess.Popen', 'subprocess.call', 'subprocess.check_output', 'subprocess.check_call'}
EVALUATES = {'eval', 'exec'}


def breaches(source: str) -> Iterator[str]:
    """What `source` does that it must not, with the line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ''] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            for name in UNSAFE_MODULES & {name.partition('.')[0] for name in names}:
                yield f'{node.lineno}: imports {name}'
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in UNSAFE_CALLS or name in EVALUATES or name.endswith('.unsafe_load'):
                yield f'{node.lineno}: calls {name}'
            if name in SHELLS and any(keyword.arg == 'shell' for keyword in node.keywords):
                yield f'{node.lineno}: starts a shell'


def test_yaml_is_loaded_safely_and_nothing_is_pickled_or_evaluated():
    assert len(OURS) > 100
    found = [f'{path.relative_to(ROOT)}:{breach}' for path in OURS for breach in breaches(path.read_text())]
    assert not found, '\n'.join(found)


@pytest.mark.parametrize(
    'source',
    ['import pickle', 'from pickle import loads', 'yaml.load(x)', 'yaml.unsafe_load(x)', 'eval(x)', 'torch.load(x)']
    + ['import os\nos.system(x)', 'subprocess.run(x, shell=True)'],
)
def test_each_of_them_would_be_found(source):
    assert list(breaches(source))


def test_every_log_line_of_a_server_goes_through_inert():
    """Whatever a server logs may quote a model: its logger is called in one place, and with nothing else."""
    for path in sorted((ROOT / 'treepo_swift' / 'server').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(('logger.', 'logging.', 'print')):
                shown = ast.unparse(node)
                assert path.name == 'watchdog.py' or 'inert(' in shown, f'{path.name}:{node.lineno}: {shown}'
