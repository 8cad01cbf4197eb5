"""Whether the methods of ms-swift that we override, replace or call are still those that were read."""

from __future__ import annotations

import pytest

pytest.importorskip('swift')
pytest.importorskip('vllm')

from packaging.version import Version

from tests.integration.megatron_stub import installed
from tests.integration.swift_methods import (
    MEGATRON,
    USED,
    describe,
    differences,
    load_table,
    overridden,
    read_installed,
)
from treepo_swift.compat.capabilities import MEGATRON_NEEDS, SERVER_NEEDS, TRAINER_NEEDS, require
from treepo_swift.compat.versions import TESTED, installed_version

TABLE = load_table()
VERSIONS = sorted(TABLE['methods'], key=Version)
RECORD = 'Read what changed, then record it: python -m tests.integration.swift_methods'

CLASS = """
class Trainer:
    @decorated
    def learn(self, batch, *, rate=1):
        # why
        return batch * rate
"""


def say(found: dict[str, str]) -> str:
    return '\n'.join(f'  {path}: {what}' for path, what in found.items())


def test_swifts_methods_are_those_that_were_read():
    version = installed_version('ms-swift')
    installed = read_installed()
    if version not in TABLE['methods']:
        newest = VERSIONS[-1]
        found = differences(TABLE['methods'][newest], installed)
        pytest.skip(
            f'ms-swift {version} is not in swift_methods.json. Against {newest}, {len(found)} of {len(installed)} '
            f'methods differ:\n{say(found)}\n{RECORD}'
        )
    found = differences(TABLE['methods'][version], installed)
    assert not found, f'ms-swift {version}:\n{say(found)}\n{RECORD}'


def test_every_tested_version_is_recorded():
    assert {swift for _, swift in TESTED} == set(VERSIONS)


@pytest.mark.parametrize(('old', 'new'), list(zip(VERSIONS, VERSIONS[1:])))
def test_every_change_between_versions_was_read(old, new):
    found = differences(TABLE['methods'][old], TABLE['methods'][new])
    reviewed = TABLE['reviewed'].get(f'{old} -> {new}', {})
    unread = {path: what for path, what in found.items() if not reviewed.get(path)}
    assert not unread, f'Say under "reviewed" in swift_methods.json why ours still holds:\n{say(unread)}'
    assert set(reviewed) == set(found), 'reviewed, and not changed: ' + ', '.join(set(reviewed) - set(found))


def test_what_is_overridden_is_asked_for_at_start():
    """A version without it is refused by name; what is private has no other promise."""
    asked = {need.path.rpartition('.')[2] for need in (*SERVER_NEEDS, *TRAINER_NEEDS)}
    methods = {path.rpartition('.')[2] for path in overridden('treepo_swift.trainer.trainer:TreeGRPOTrainer')}
    methods |= {path.rpartition('.')[2] for path in USED}
    # Done without where they are missing; or refused where a key asks for the last.
    methods -= {'_check_device_count', '_start_data_parallel_workers', '_register_rl_rollout_app'}
    private = {method for method in methods if method.startswith('_') and not method.endswith('__')}
    assert private and private <= asked, private - asked


def test_what_megatrons_trainer_overrides_is_asked_for_where_megatron_is():
    with installed():
        require(MEGATRON_NEEDS)
        methods = {path.rpartition('.')[2] for path in overridden(MEGATRON)}
    asked = {need.path.rpartition('.')[2].partition('(')[0] for need in MEGATRON_NEEDS}
    assert methods and methods <= asked, methods - asked


@pytest.mark.parametrize(
    ('change', 'what'),
    [
        (('rate=1', 'rate=2'), 'signature was (self, batch, *, rate=1), is (self, batch, *, rate=2)'),
        (('* rate', '+ rate'), 'same signature, another body'),
        (('@decorated', '@other'), 'same signature, another body'),
        (('# why', '# because'), None),
        (('def learn', 'def learn'), None),
    ],
)
def test_a_change_is_noticed_and_named(change, what):
    old = {'swift:Trainer.learn': describe(CLASS.strip(), 'learn')}
    new = {'swift:Trainer.learn': describe(CLASS.strip().replace(*change), 'learn')}
    assert differences(old, new) == ({} if what is None else {'swift:Trainer.learn': what})


def test_methods_that_come_and_go_are_named():
    one = {'swift:A.f': {'signature': '()', 'source': ''}}
    assert differences(one, {}) == {'swift:A.f': 'is not overridden or used any more'}
    assert differences({}, one) == {'swift:A.f': 'was never recorded'}
