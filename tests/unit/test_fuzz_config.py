"""Whatever a config says: it is taken, or refused with a `ConfigError` that names what is wrong."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz import examples
from treepo_swift.config import ConfigError, TreeConfig

KEYS = st.sampled_from(
    [
        *TreeConfig.model_fields,
        'policy',
        'detector',
        'rule',
        'estimator',
        'tokens',
        'tags',
        'order',
        'options',
        'answer',
    ]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ['even', 'logprob', 'boxed', 'tags', 'none', 'loop', 'random_token', 'treepo', 'by_segment_tokens']
    ),
    st.dates(),
    st.binary(max_size=4),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(KEYS, st.text(max_size=4)), inner, max_size=4)
    ),
    max_leaves=12,
)


def taken_or_refused(load: Any) -> None:
    try:
        config = load()
    except ConfigError as e:
        assert len(str(e).split()) >= 3, str(e)
        return
    assert TreeConfig.from_dict(config.to_dict()) == config
    assert TreeConfig.from_dict(config.to_note()) == config


@given(st.dictionaries(KEYS, VALUES, max_size=5))
@examples(150)
@example({'pacing': {}})
@example({'pacing': {1: None, 2: None}})
@example({'pacing': {True: 1}})
@example({'faults': {'hook_timeout': float('inf')}})
@example({'divergence': (2**70, 2**70)})
@example({'stop': {'answer': {'detector': ['boxed']}}})
def test_any_values_are_taken_or_refused_by_name(values):
    taken_or_refused(lambda: TreeConfig.from_dict(values))


@given(st.one_of(st.text(), st.binary(), st.dictionaries(KEYS, VALUES, max_size=3).map(yaml.dump)))
@examples(150)
@example(b'\xff\xfe')
@example('\x00')
@example('{' * 2000)
@example('!!python/object/apply:os.system ["true"]')
@example('a: &a [*a]')
@example('seed: 2001-13-45')
@example('1' * 5000)
@example('? [a]\n: 1')
@example('? {a: 1}\n: 1')
def test_any_file_is_taken_or_refused_by_name(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'tree.yaml')
        path.write_bytes(content if isinstance(content, bytes) else content.encode('utf-8', 'surrogatepass'))
        taken_or_refused(lambda: TreeConfig.load({'TREEPO_CONFIG': str(path)}))


@given(
    st.dictionaries(st.one_of(KEYS, st.text(max_size=6)).map(lambda k: f'TREEPO_{k.upper()}'), st.text(), max_size=4)
)
@examples(150)
@example({'TREEPO_': '1'})
@example({'TREEPO___': '1'})
@example({'TREEPO_FAULTS__': '1'})
@example({'TREEPO_FAULTS__MAX_RETRIES__X': '1', 'TREEPO_FAULTS': 'x'})
@example({'TREEPO_SEED': '!!python/name:os.system'})
@example({'TREEPO_SEED': '{' * 2000})
@example({'TREEPO_PACING': '? [1]\n: 1'})
def test_any_environment_is_taken_or_refused_by_name(environ):
    environ.pop('TREEPO_CONFIG', None)
    taken_or_refused(lambda: TreeConfig.load(environ))


def test_a_folder_is_no_config_file(tmp_path):
    with pytest.raises(ConfigError, match='is not a file'):
        TreeConfig.load({'TREEPO_CONFIG': str(tmp_path)})
