"""`import treepo_swift` is cheap, and what it offers is there, in `dir()` and in the eyes of type checkers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import treepo_swift

NEED_SWIFT = {'TreeRolloutScheduler', 'TreeGymScheduler'}
NEED_TORCH = {'shared_logprobs'}


@pytest.mark.parametrize('name', treepo_swift.__all__)
def test_every_public_name_is_there(name):
    if name in NEED_SWIFT:
        pytest.importorskip('swift')
    if name in NEED_TORCH:
        pytest.importorskip('transformers')
    assert getattr(treepo_swift, name).__name__ == name
    assert name in dir(treepo_swift)


def test_type_checkers_see_what_is_loaded():
    """The imports under TYPE_CHECKING, the table of modules and `__all__` say the same."""
    block = next(node for node in ast.parse(Path(treepo_swift.__file__).read_text()).body if isinstance(node, ast.If))
    seen = {name.name: line.module for line in block.body for name in line.names}
    assert seen == {name: f'treepo_swift.{module}' for name, module in treepo_swift._MODULE_OF.items()}
    assert sorted(seen) == treepo_swift.__all__


def test_a_wrong_name_is_named():
    with pytest.raises(AttributeError, match="'treepo_swift' has no attribute 'TreeSheduler'; public are .*TreeConfig"):
        treepo_swift.TreeSheduler  # noqa: B018
    with pytest.raises(ImportError, match='TreeSheduler'):
        from treepo_swift import TreeSheduler  # noqa: F401


def test_only_the_schedulers_load_swift():
    code = f"""
import sys, treepo_swift
print([m for m in sys.modules if m.startswith('treepo_swift.')])
for name in set(treepo_swift.__all__) - {NEED_SWIFT | NEED_TORCH!r}:
    getattr(treepo_swift, name)
print([m for m in ('torch', 'vllm', 'swift', 'transformers') if m in sys.modules])"""
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n[]\n'


def test_every_registration_is_the_same_idiom():
    """A plugin's policies work by their names, and a taken name is refused, by whom it is meant."""
    from treepo_swift.advantage import registry
    from treepo_swift.core.policies.answers import answer_detectors
    from treepo_swift.core.policies.branching import branching_policies
    from treepo_swift.core.policies.fallback import cut_policies
    from treepo_swift.core.policies.fork_position import fork_positions

    for register, table, kind in (
        (treepo_swift.register_branching, branching_policies, 'branching policy'),
        (treepo_swift.register_fallback, cut_policies, 'fallback'),
        (treepo_swift.register_fork_position, fork_positions, 'fork position'),
        (treepo_swift.register_answer, answer_detectors, 'answer detector'),
        (treepo_swift.register_advantage, registry._estimators, 'advantage estimator'),
    ):
        taken = next(iter(table))
        try:

            @register('test_idiom')
            def mine(*args, **options):
                raise NotImplementedError

            assert table['test_idiom'].__qualname__ == mine.__qualname__
            with pytest.raises(ValueError, match=f'^{kind} {taken!r} is registered already: choose another'):
                register(taken)(mine)
        finally:
            table._entries.pop('test_idiom', None)
    registry._levels.pop('test_idiom')
    with pytest.raises(ValueError, match="fallback 'root' cuts nothing"):
        treepo_swift.register_fallback('root')
