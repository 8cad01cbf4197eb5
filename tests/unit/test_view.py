"""Reading trees from disk, what the page and its JSON twin hold, the terminal, and the vendored libraries."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
import zlib

import pytest

from tests.trees import answer, large, node, small, tree
from treepo_swift.advantage import estimate, register_advantage
from treepo_swift.cli.main import main
from treepo_swift.view import TreesError, load
from treepo_swift.view.advantages import ESTIMATORS, TRAINED, node_advantages
from treepo_swift.view.page import SCRIPTS, VENDORED, describe, html
from treepo_swift.view.terminal import rendered

HOSTILE = '</script><script>alert(1)</script>\u2028\x1b[31m\u202e<!--'


def write(folder, *records, name='rank-0.jsonl'):
    path = folder / 'trees' / name
    path.parent.mkdir(exist_ok=True, parents=True)
    with path.open('a') as file:
        file.writelines(record.to_json() + '\n' for record in records)
    return path


def test_a_file_a_folder_and_a_run_are_read(tmp_path):
    run = tmp_path / 'seed-1' / 'train'
    second = write(run, small('c', step=1), name='rank-10.jsonl')
    path = write(run, small('a', step=1), small('b', step=2))
    assert [r.tree for r in load(path)] == ['a', 'b'] and load(second) == [small('c', step=1)]
    for place in (path.parent, run, run.parent, tmp_path):
        assert [r.tree for r in load(place)] == ['a', 'c', 'b'], place


def test_of_several_runs_one_is_to_be_named(tmp_path):
    for run in ('seed-1/train', 'seed-2/train'):
        write(tmp_path / run, small())
    with pytest.raises(TreesError, match=r'(?s)the trees of 2 runs.*seed-1/train\n.*seed-2/train'):
        load(tmp_path)
    assert load(tmp_path / 'seed-2') == [small()]


def test_what_is_no_tree_is_refused_with_its_place(tmp_path):
    with pytest.raises(TreesError, match='does not exist'):
        load(tmp_path / 'nowhere')
    with pytest.raises(TreesError, match='--log_completions true'):
        load(tmp_path)
    path = tmp_path / 'completions.jsonl'
    path.write_text('{"step": ["1"]}\n')
    with pytest.raises(TreesError, match='line 1 is not a tree'):
        load(path)
    path.write_text('{"version": 1}\n')
    with pytest.raises(TreesError, match="line 1: it has no 'nodes'"):
        load(path)
    path.write_text('{"version": 99}\n')
    with pytest.raises(TreesError, match='line 1: version 99 of a tree: this treepo_swift reads 1'):
        load(path)


def test_estimators_are_those_of_training():
    records = [small('a'), small('b', rewards=(0.0, 1.0, 1.0))]
    for record, values in zip(records, node_advantages(records), strict=True):
        assert list(values) == [TRAINED, *ESTIMATORS]
        healthy = record.trajectories[:3]
        paths = [['u', *path] for path in record.segment_paths()[:3]]
        for leaf, expected in zip((2, 5, 6), estimate(paths, [t.reward for t in healthy]), strict=True):
            at = [n.id for n in record.nodes].index(leaf)
            assert values['treepo'][at] == pytest.approx(expected, abs=1e-3)
            assert values[TRAINED][at] == healthy[(2, 5, 6).index(leaf)].advantage
        # The trunk has the mean of all, what the tool said has none.
        assert values[TRAINED][0] == pytest.approx(sum(t.advantage for t in healthy) / 3, abs=1e-3)
        assert values['treepo'][3] is None


def test_the_estimators_of_the_package_are_all_there_and_no_others():
    code = 'from treepo_swift.advantage import registered_estimators as r; print(*r())'
    built_in = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert sorted(ESTIMATORS) == built_in

    @register_advantage('wants_options')
    def wants_options(paths, rewards, *, scale):
        return [reward * scale for reward in rewards]

    assert 'wants_options' not in node_advantages([small()])[0]


def test_a_tree_that_failed_whole_can_be_shown():
    lost = tree('lost', [], [answer(0, None, stop='failed', error='no room')])
    described = describe([lost], 'x')
    assert described['trees'][0]['summary']['low'] is None and ''.join(html(described))
    assert 'no room' in printed(lost)


def page_of(*records):
    return ''.join(html(describe(records, HOSTILE)))


def test_the_page_is_one_file_without_a_network():
    page = page_of(small())
    assert not re.search(r'(src|href)\s*=|@import|url\(', re.sub(r'<script>.*?</script>', '', page, flags=re.S))
    assert "default-src 'none'" in page and 'unsafe' not in page.split('</head>')[0]


def test_every_script_of_the_page_is_named_by_its_hash_and_nothing_else_is():
    page = page_of(small('a', text=HOSTILE))
    policy = re.search(r'content="(default-src[^"]*)"', page)[1]
    scripts = re.findall(r'<script>(.*?)</script>', page, flags=re.S)
    assert len(scripts) == len(VENDORED) + 1 and '\r' not in page
    for text in [*scripts, re.search(r'<style>(.*?)</style>', page, flags=re.S)[1]]:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    # Data blocks, and the three that run: no text has opened or closed another.
    assert page.count('<script') == len(scripts) + 2 == page.count('</script')


def test_the_scripts_never_make_markup_of_text():
    page = page_of(small())
    ours = re.findall(r'<script>(.*?)</script>', page, flags=re.S)[-1]
    assert not re.search(
        r'innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser', ours
    )
    assert len(SCRIPTS) == 6


def test_a_packed_tree_is_what_the_twin_says(tmp_path):
    described = describe([small('a', text=f'€ 🎄{HOSTILE}\ud800')], 'x')
    page = ''.join(html(described))
    line = re.search(r'id="trees">(.*?)\n', page, flags=re.S)[1]
    packed = json.loads(zlib.decompress(base64.b64decode(line), -15))
    twin = json.loads(json.dumps(described))['trees'][0]
    assert packed['trajectories'] == twin['trajectories'] and packed['advantages'] == twin['advantages']
    node = packed['nodes'][1]
    # Lengths are JavaScript's: the tree is two units there.
    assert node['pieces'][0] == len(node['text'].encode('utf-16-le')) // 2 - 1


def test_prompts_are_listed_by_their_question():
    record = small()
    record.prompt = (
        '<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n'
    )
    assert '"prompts":["You help. How many?"]' in page_of(record)
    record.prompt = 'x' * 1000
    assert f'"prompts":["...{"x" * 160}"]' in page_of(record)


def test_the_command_writes_the_page_and_its_twin(tmp_path, capsys):
    write(tmp_path, small('a', step=1), small('b', step=2), large('c', seed=1, step=2))
    assert main(['view', str(tmp_path)]) == 0
    assert '3 trees' in capsys.readouterr().out
    assert len(json.loads((tmp_path / 'trees.json').read_text())['trees']) == 3
    out = tmp_path / 'deep' / 'page.html'
    assert main(['view', str(tmp_path), '--output', str(out), '--no-json', '--step', '2', '--last', '1']) == 0
    assert '"source"' in out.read_text() and not out.with_suffix('.json').exists()
    assert json.loads(re.search(r'id="index">(.*?)</script>', out.read_text())[1])['trees'][0]['id'] == 'c'
    assert main(['view', str(tmp_path), '--tree', 'nope']) == 1
    assert 'None of the 3 trees' in capsys.readouterr().err
    assert main(['view', str(tmp_path / 'no')]) == 1
    assert main(['view', str(tmp_path), '--output', str(tmp_path / 'trees.json' / 'below a file.html')]) == 1
    assert 'trees.json' in capsys.readouterr().err
    assert main(['view', str(tmp_path), '--terminal', '--tree', 'a']) == 0
    assert 'step 1' in capsys.readouterr().out


def printed(record) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    console.print(rendered(record))
    return re.sub(r'\x1b\[[0-9;]*m', '', console.file.getvalue())


def test_the_terminal_shows_forks_ends_and_failures():
    text = printed(small())
    for part in ('[1] 3 tokens x3', 'fallback from #1', '✓ #1 answer', '▲ #3 token_limit', '✕ #4 failed', 'KeyError'):
        assert part in text, part
    assert '<tool>11</tool>' in text and 'reward 1  advantage +0.50' in text


def test_model_text_does_nothing_to_a_terminal():
    record = small(text='[red]\x1b]0;title\x07[/red]')
    record.trajectories[3].error = '\x1b[31m'
    assert '\x07' not in printed(record) and '[red]\\x1b]0;title' in printed(record)


def test_a_node_alone_needs_no_logprobs():
    record = tree('x', [node(1, 0, ['hi'])], [answer(1, 1.0)])
    record.nodes[0].logprobs = None
    assert 'logprobs' not in describe([record], 'x')['trees'][0]['nodes'][0]


def test_vendored_libraries_are_as_recorded():
    from importlib.resources import files

    folder = files('treepo_swift.view').joinpath('web/vendor')
    sums = dict(reversed(line.split()) for line in folder.joinpath('SHA256SUMS').read_text().splitlines())
    assert {f'{name}.{kind}' for name in VENDORED for kind in ('LICENSE', 'min.js')} == {*sums}
    for name, expected in sums.items():
        assert hashlib.sha256(folder.joinpath(name).read_bytes()).hexdigest() == expected, name
