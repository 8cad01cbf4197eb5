"""The first lines of a run's log: what tree will grow, in words that hold."""

from __future__ import annotations

import os

import pytest
import yaml

from treepo_swift.cli.main import main
from treepo_swift.config import TreeConfig
from treepo_swift.trainer.growth import describe_growth


def lines(environ: dict[str, str], *, width: int = 8, max_response: int = 256, block_size: int = 32) -> list[str]:
    config = TreeConfig.load_for(max_response, environ, width=width, block_size=block_size)
    return list(describe_growth(config, width=width, max_response=max_response, block_size=block_size))


def test_a_run_without_a_config():
    shape, saving, origin = lines({})
    assert shape == (
        'each prompt grows one tree of W=8 answers. First branches at the prompt: 2. At every segment boundary, and '
        'where a turn begins, a path goes on as d=2 paths, until there are 8. A path has at most D=8 segments of S=32 '
        'tokens in a turn, 256 in all.'
    )
    assert saving.startswith('where paths use their whole length, such a tree decodes 16% fewer tokens than 8 ')
    assert origin.startswith(
        'nothing of this was set, so it was chosen to fit --max_completion_length 256, --num_generations 8 and the '
        "engine's KV block of 32 tokens. To change it, set TREEPO_SEGMENT_LENGTH, TREEPO_MAX_DEPTH, TREEPO_DIVERGENCE, "
        'TREEPO_ROOT_DIVERGENCE, or name a YAML file by TREEPO_CONFIG'
    )


@pytest.mark.parametrize(
    ('environ', 'said'),
    [
        ({'TREEPO_ROOT_DIVERGENCE': '[2, 8]'}, 'First branches at the prompt: 2 to 8 (drawn).'),
        ({'TREEPO_ROOT_DIVERGENCE': '20'}, 'First branches at the prompt: 8.'),
        ({'TREEPO_PACING': 'even'}, 'until there are 8, spread over all depths.'),
        ({'TREEPO_PACING': '{2: 4, 5: 8}'}, 'until there are 8, paced by {2: 4, 5: 8}.'),
        (
            {'TREEPO_FORK_AT': 'segment', 'TREEPO_DIVERGENCE': '[2, 3]'},
            'boundary within a turn a path goes on as d=2 to 3',
        ),
        (
            {'TREEPO_FORK_POSITION': 'min_logprob_token'},
            "in all. Forks start where fork_position='min_logprob_token' says.",
        ),
        ({'TREEPO_FORK_AT': 'turn'}, 'Where a turn begins a path goes on as'),
        (
            {'TREEPO_FORK_AT': 'segment', 'TREEPO_MAX_DEPTH': '1'},
            'Paths have one segment of at most S=256 tokens, so nothing forks later.',
        ),
    ],
)
def test_the_shape_is_the_configs(environ, said):
    assert said in lines(environ)[0]


def test_what_was_set_is_said():
    assert lines({'TREEPO_MAX_DEPTH': '4'})[-1].startswith(
        'D: as you set them; the rest fits --max_completion_length 256. To change it'
    )
    everything = {f'TREEPO_{key}': '2' for key in ('MAX_DEPTH', 'DIVERGENCE', 'ROOT_DIVERGENCE', 'SEGMENT_LENGTH')}
    assert lines(everything)[-1].startswith('S, D, d, first branches: as you set them. To')
    assert len(lines({'TREEPO_FORK_AT': 'turn'})) == 2


def config_command(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    return main(['config', *args]), *capsys.readouterr()


def test_the_command_says_what_a_run_would_get(capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith('TREEPO_')]:
        monkeypatch.delenv(name)
    status, out, _ = config_command(
        capsys, '--max-completion-length', '256', '--num-generations', '16', '--block-size', '128'
    )
    assert status == 0 and '# each prompt grows one tree of W=16 answers. First branches at the prompt: 8.' in out
    config = TreeConfig.from_dict(yaml.safe_load(out))
    assert (config.segment_length, config.max_depth, config.root_divergence) == (128, 2, 8)
    assert config_command(capsys)[1] == TreeConfig().to_yaml()
    assert config_command(capsys, '--max-completion-length', '0') == (
        1,
        '',
        'treepo-swift config: --max-completion-length 0: must be at least 1.\n',
    )
