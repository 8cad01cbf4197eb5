from __future__ import annotations

import dataclasses

import pytest
import yaml

from treepo_swift.config import ConfigError, TreeConfig


def test_defaults_are_the_papers_main_setting():
    config = TreeConfig.load({})
    assert (config.segment_length, config.max_depth, config.divergence, config.root_divergence) == (512, 14, 2, 2)
    assert config.max_response_tokens == 7168


def test_yaml_then_environment(tmp_path):
    path = tmp_path / 'tree.yaml'
    path.write_text('segment_length: 64\nroot_divergence: [2, 8]\nseed: 3\n')
    config = TreeConfig.load({'TREEPO_CONFIG': str(path), 'TREEPO_SEED': '5', 'TREEPO_STOP_AT_REPETITION': 'false'})
    assert config == TreeConfig(segment_length=64, root_divergence=(2, 8), seed=5, stop_at_repetition=False)


def test_a_config_survives_json_and_yaml():
    config = TreeConfig(root_divergence=(2, 8), weighting='size')
    assert TreeConfig.from_dict(config.to_dict()) == config
    assert TreeConfig.from_dict(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize(
    'environ, message',
    [
        ({'TREEPO_SEGMENTLENGTH': '64'}, "environment variable TREEPO_SEGMENTLENGTH: unknown key 'segmentlength'"),
        ({'TREEPO_SEGMENT_LENGTH': '0'}, 'TREEPO_SEGMENT_LENGTH: segment_length=0: must be an integer of at least 1'),
        ({'TREEPO_SEGMENT_LENGTH': '6.5'}, 'segment_length=6.5: must be an integer'),
        ({'TREEPO_MAX_DEPTH': 'true'}, 'max_depth=True: must be an integer of at least 1'),
        ({'TREEPO_STOP_AT_REPETITION': '1'}, 'stop_at_repetition=1: must be true or false'),
        (
            {'TREEPO_ROOT_DIVERGENCE': '[3, 2]'},
            r'root_divergence=\[3, 2\]: must be an integer of at least 1, or a pair',
        ),
        ({'TREEPO_WEIGHTING': 'max'}, "weighting='max': must be 'average' or 'size'"),
        ({'TREEPO_MAX_FAILURE_FRACTION': '1.5'}, 'must be a number of at least 0 and at most 1'),
        ({'TREEPO_HOOK_TIMEOUT': '.nan'}, 'hook_timeout=nan'),
        ({'TREEPO_SEED': '{'}, 'can not be read as a YAML value'),
        ({'TREEPO_CONFIG': '/no/such/file.yaml'}, 'is not a file'),
    ],
)
def test_bad_settings_are_refused_by_name(environ, message):
    with pytest.raises(ConfigError, match=message):
        TreeConfig.load(environ)


@pytest.mark.parametrize(
    'text, message',
    [
        ('segment_lenght: 3', "tree.yaml .*: unknown key 'segment_lenght'. Allowed are: segment_length"),
        ('- a', 'must hold "key: value" lines'),
        ('a: [', 'is not valid YAML'),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / 'tree.yaml'
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        TreeConfig.load({'TREEPO_CONFIG': str(path)})


def test_an_empty_file_means_defaults(tmp_path):
    path = tmp_path / 'tree.yaml'
    path.write_text('')
    assert TreeConfig.load({'TREEPO_CONFIG': str(path)}) == TreeConfig()


def test_limits_name_both_sides():
    with pytest.raises(ConfigError, match='14 x 512 = 7168 tokens is over --max_completion_length = 4096'):
        TreeConfig().check_fits(4096, '--max_completion_length')
    TreeConfig().check_fits(7168, '--max_completion_length')


def test_every_field_has_documentation_and_reference_is_current():
    from pathlib import Path

    from treepo_swift.config import reference

    assert all(field.metadata['doc'] for field in dataclasses.fields(TreeConfig))
    page = Path(__file__).parents[2] / 'docs' / 'configuration.md'
    assert reference() in page.read_text(), 'run: treepo-swift config --reference, and paste it into the page'


def test_segments_share_out_the_response_where_nothing_says_how_long_they_are():
    fitted = TreeConfig.load_for(2048, {})
    assert (fitted.segment_length, fitted.max_depth) == (144, 14)
    assert TreeConfig.load_for(100, {}).segment_length == 7 and TreeConfig.load_for(8192, {}) == TreeConfig()
    asked = TreeConfig.load_for(2048, {'TREEPO_MAX_DEPTH': '6'})
    assert (asked.segment_length, asked.max_depth) == (512, 6)
