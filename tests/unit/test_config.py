from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from treepo_swift.config import SHAPE, ConfigError, TreeConfig, reference, schema
from treepo_swift.config.errors import GONE, MOVED, models_of
from treepo_swift.config.sections import REASONS, Stop
from treepo_swift.core.budgets import expected_saving
from treepo_swift.core.tree import StopReason

ROOT = Path(__file__).parents[2]


def test_defaults_are_the_papers():
    config = TreeConfig.load({})
    assert (config.segment_length, config.max_depth, config.divergence, config.root_divergence) == (512, 14, 2, 2)
    assert config.max_response_tokens == 7168 and config.to_note() == {}


def test_yaml_then_environment(tmp_path):
    path = tmp_path / 'tree.yaml'
    path.write_text('segment_length: 64\nroot_divergence: [2, 8]\nseed: 3\nbranching: {policy: logprob, score: sum}\n')
    environ = {
        'TREEPO_CONFIG': str(path),
        'TREEPO_SEED': '5',
        'TREEPO_BRANCHING__TEMPERATURE': '[5, 1]',
        'TREEPO_STOP__REPETITION': 'none',
        'TREEPO_FAULTS__HOOK_TIMEOUT': '3',
    }
    assert TreeConfig.load(environ) == TreeConfig(
        segment_length=64,
        root_divergence=(2, 8),
        seed=5,
        branching={'policy': 'logprob', 'score': 'sum', 'temperature': (5.0, 1.0)},
        stop={'repetition': 'none'},
        faults={'hook_timeout': 3.0},
    )


def test_a_string_names_what_stands_in_a_section():
    config = TreeConfig.load(
        {'TREEPO_BRANCHING': 'entropy', 'TREEPO_BRANCHING__TOP_K': '5', 'TREEPO_ADVANTAGE': 'rloo'}
    )
    assert config == TreeConfig(branching={'policy': 'entropy', 'top_k': 5}, advantage={'estimator': 'rloo'})
    # The default's keys need no name.
    assert TreeConfig(fallback={'window': 2}).fallback.policy == 'random_segment'


def test_a_policy_of_ones_own_has_options_of_its_own():
    config = TreeConfig(branching={'policy': 'mine', 'options': {'weight': 2}})
    assert config.branching.options == {'weight': 2} and TreeConfig.from_dict(config.to_dict()) == config


def test_a_config_survives_json_and_yaml():
    config = TreeConfig(root_divergence=(2, 8), advantage={'weighting': 'size'}, pacing={1: 2, 3: 8}, budget='by_width')
    assert TreeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert TreeConfig.from_dict(json.loads(json.dumps(config.to_note()))) == config
    assert TreeConfig.from_dict(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize(
    'environ, message',
    [
        ({'TREEPO_SEGMENTLENGTH': '64'}, "environment variable TREEPO_SEGMENTLENGTH: unknown key 'segmentlength'"),
        (
            {'TREEPO_SEGMENT_LENGTH': '0'},
            'variable TREEPO_SEGMENT_LENGTH: segment_length=0: must be greater than or eq',
        ),
        ({'TREEPO_SEGMENT_LENGTH': '6.5'}, 'segment_length=6.5: must be a valid integer'),
        ({'TREEPO_MAX_DEPTH': 'true'}, 'max_depth=True: must be a valid integer'),
        ({'TREEPO_EVAL_TREES': '1'}, 'eval_trees=1: must be a valid boolean'),
        ({'TREEPO_ROOT_DIVERGENCE': '[3, 2]'}, r'root_divergence=\[3, 2\]: a pair \[low, high\] must have low <= high'),
        ({'TREEPO_ADVANTAGE__WEIGHTING': 'max'}, "advantage.weighting='max': must be 'average' or 'size'"),
        ({'TREEPO_FAULTS__MAX_FAILURE_FRACTION': '1.5'}, 'less than or equal to 1'),
        ({'TREEPO_FAULTS__HOOK_TIMEOUT': '.nan'}, 'faults.hook_timeout=nan: must be a finite number'),
        ({'TREEPO_FAULTS__HOOK': '3'}, "unknown key 'faults.hook'. Allowed are: max_retries"),
        ({'TREEPO_SEED': '{'}, 'can not be read as a YAML value'),
        ({'TREEPO_CONFIG': '/no/such/file.yaml'}, 'is not a file'),
        ({'TREEPO_BUDGET': 'by_segment_tokens'}, 'TREEPO_BUDGET: budget.tokens is missing'),
        ({'TREEPO_BUDGET': 'by_prompt'}, 'policy must be one of by_width, by_segment_tokens'),
        ({'TREEPO_BRANCHING__TOP_K': '3'}, 'branching.top_k has no effect here: it belongs to policy: entropy'),
        ({'TREEPO_PACING': '{3: 4, 5: 2}'}, 'widths that never fall'),
        ({'TREEPO_PACING': 'early'}, "pacing='early': must be 'eager' or 'even'"),
        ({'TREEPO_STOP__ORDER': '[eos, eos]'}, 'names a reason twice'),
        ({'TREEPO_STOP__ORDER': '[failed]'}, "must be 'answer', 'eos'"),
        (
            {'TREEPO_FORK_AT': 'turn', 'TREEPO_FALLBACK': 'random_token'},
            "environment variable TREEPO_FALLBACK, environment variable TREEPO_FORK_AT: fork_at='turn' with",
        ),
    ],
)
def test_bad_settings_are_refused_by_place_and_name(environ, message):
    with pytest.raises(ConfigError, match=message):
        TreeConfig.load(environ)


@pytest.mark.parametrize(
    'text, message',
    [
        ('segment_lenght: 3', "tree.yaml .*: unknown key 'segment_lenght'. Allowed are: segment_length"),
        (
            'stop: {answer: {tags: [a, b]}}',
            'tree.yaml .*: stop.answer.tags has no effect here: it belongs to detector: t',
        ),
        ('- a', 'must hold "key: value" lines'),
        ('1: 2', 'keys must be names'),
        ('a: [', 'is not valid YAML'),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / 'tree.yaml'
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        TreeConfig.load({'TREEPO_CONFIG': str(path)})


def test_every_wrong_value_is_named_with_its_place(tmp_path):
    path = tmp_path / 'tree.yaml'
    path.write_text('max_depth: 0\nfaults: {max_retries: -1}\n')
    with pytest.raises(ConfigError) as caught:
        TreeConfig.load({'TREEPO_CONFIG': str(path), 'TREEPO_FAULTS__HOOK_TIMEOUT': 'soon'})
    lines = str(caught.value).splitlines()
    assert [line.partition(': ')[0].split()[0] for line in lines] == [str(path), str(path), 'environment']


@pytest.mark.parametrize('key', [*MOVED, *GONE])
def test_an_old_flat_key_says_where_it_went(key):
    with pytest.raises(ConfigError, match=r'keys are in sections|does not exist any more'):
        TreeConfig(**{key: 'x'})


def test_old_keys_name_keys_that_exist():
    for place in MOVED.values():
        *sections, name = place.split(' ')[0].rstrip(',:').split('.')
        members: list[type[BaseModel]] = [TreeConfig]
        for section in sections:
            members = [m for cls in members if section in cls.model_fields for m in models_of(cls, section)]
        assert any(name in cls.model_fields for cls in members), place


def test_an_empty_file_means_defaults(tmp_path):
    path = tmp_path / 'tree.yaml'
    path.write_text('')
    assert TreeConfig.load({'TREEPO_CONFIG': str(path)}) == TreeConfig()


def test_limits_name_both_sides():
    asked = TreeConfig(segment_length=512, max_depth=14)
    with pytest.raises(ConfigError, match='14 x 512 = 7168 tokens is over --max_completion_length = 4096'):
        asked.check_fits(4096, '--max_completion_length')
    asked.check_fits(7168, '--max_completion_length')
    asked.check_fits(7000, '--max_completion_length')  # the last segment is shorter


@pytest.mark.parametrize('max_response', [20, 100, 2048, 4096, 7168, 16384])
def test_what_was_not_given_is_chosen_to_fill_the_response(max_response):
    config = TreeConfig.load_for(max_response, {})
    assert config.max_depth <= 14 and config.segment_length % 16 == 0 and not config.is_given('segment_length')
    assert max_response <= config.max_response_tokens < max_response + config.segment_length
    deep = TreeConfig.load_for(max_response, {'TREEPO_MAX_DEPTH': '6'})
    assert deep.max_depth <= 6 and max_response <= deep.max_response_tokens < max_response + deep.segment_length
    short = TreeConfig.load_for(max_response, {'TREEPO_SEGMENT_LENGTH': '64'})
    assert short.segment_length == 64 and max_response <= short.max_response_tokens < max_response + 64
    for filled in (config, deep, short):
        filled.check_fits(max_response, '--max_completion_length')


@pytest.mark.parametrize('block_size', [16, 32, 128, 784])
@pytest.mark.parametrize('max_response', [20, 100, 256, 2048, 7168])
@pytest.mark.parametrize('width', [2, 3, 4, 8, 16, 64])
def test_a_config_from_nothing_fits_the_run(max_response, width, block_size):
    config = TreeConfig.load_for(max_response, {}, width=width, block_size=block_size)
    assert not any(config.is_given(key) for key in SHAPE)
    assert max_response <= config.max_response_tokens < max_response + config.segment_length
    # Whole blocks, but where one block is longer than an answer; and always a boundary, so that something is shared.
    assert config.segment_length % (block_size if block_size < max_response else 16) == 0
    assert 2 <= config.max_depth <= 14
    paths = config.root_divergence
    assert paths <= width and paths * 2 ** (config.max_depth - 1) >= width
    assert expected_saving(config, width) > 0


def test_the_papers_run_gets_the_papers_tree():
    config = TreeConfig.load_for(7168, {}, width=16)
    assert config == TreeConfig() and not config.model_fields_set


def test_first_branches_are_fitted_only_where_nothing_of_the_shape_was_given():
    short = dict(max_response=256, width=16, block_size=128)
    assert TreeConfig.load_for(environ={}, **short).root_divergence == 8
    for key, value in (('SEGMENT_LENGTH', '128'), ('MAX_DEPTH', '2'), ('DIVERGENCE', '2'), ('ROOT_DIVERGENCE', '2')):
        assert TreeConfig.load_for(environ={f'TREEPO_{key}': value}, **short).root_divergence == 2, key
    assert TreeConfig.load_for(environ={'TREEPO_SEED': '3'}, **short).root_divergence == 8


def test_a_given_depth_is_kept_where_a_block_is_longer_than_an_answer():
    config = TreeConfig.load_for(100, {'TREEPO_MAX_DEPTH': '6'}, width=8, block_size=128)
    assert (config.segment_length, config.max_depth) == (32, 4)  # 16-token blocks: 6 x 16 would be too short
    config = TreeConfig.load_for(96, {'TREEPO_MAX_DEPTH': '6'}, width=8, block_size=128)
    assert (config.segment_length, config.max_depth) == (16, 6)


def test_what_was_given_is_kept(tmp_path):
    path = tmp_path / 'tree.yaml'
    path.write_text('segment_length: 512\nmax_depth: 14\n')
    config = TreeConfig.load_for(4096, {'TREEPO_CONFIG': str(path)})
    assert config.max_response_tokens == 7168 and config.is_given('max_depth') and not config.is_given('seed')
    with pytest.raises(ConfigError, match='is over --max_completion_length = 4096'):
        config.check_fits(4096, '--max_completion_length')


def test_the_configs_stop_reasons_are_the_searchs():
    assert list(REASONS) == [reason.value for reason in StopReason if not reason.is_placeholder]
    assert get_args(get_args(Stop.model_fields['order'].annotation)[0]) == REASONS


def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
    inner = {member for name in model.model_fields for member in models_of(model, name)}
    return {model, *(cls for member in inner for cls in sections(member))}


def test_every_key_has_documentation_and_the_reference_is_current():
    for cls in sections(TreeConfig):
        assert cls.__doc__
        for name, field in cls.model_fields.items():
            assert field.description or name in ('policy', 'detector', 'rule', 'estimator'), (cls, name)
    page = ROOT / 'docs' / 'configuration.md'
    assert reference() in page.read_text(), 'run: treepo-swift config --reference, and paste it into the page'


def test_the_schema_is_current_and_takes_the_examples():
    jsonschema = pytest.importorskip('jsonschema')
    stored = json.loads((ROOT / 'docs' / 'tree_config.schema.json').read_text())
    assert stored == schema(), 'run: treepo-swift config --schema > docs/tree_config.schema.json'
    files = [path for path in (ROOT / 'examples').rglob('*.yaml') if path.name != 'matrix.yaml']  # an arena's
    assert files
    for path in files:
        values = yaml.safe_load(path.read_text())
        jsonschema.validate(values, stored)
        TreeConfig.from_dict(values)
        header = path.read_text().splitlines()[0]
        target = header.removeprefix('# yaml-language-server: $schema=')
        assert header != target and (path.parent / target).resolve() == ROOT / 'docs' / 'tree_config.schema.json', path
    for wrong in ({'segment_length': 0}, {'branching': {'policy': 'even', 'top_k': 3}}, {'unknown': 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, stored)
