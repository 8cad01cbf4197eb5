from __future__ import annotations

import dataclasses
import json
import math
import random
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import grow, segment_of
from tests.flat import PLACES, flat
from treepo_swift.cli.main import main
from treepo_swift.config import TreeConfig
from treepo_swift.lab.lengths import LengthDistribution
from treepo_swift.lab.simulation import EngineModel, Setup, read_bench, simulate
from treepo_swift.lab.simulation.engine import SimulatedEngine
from treepo_swift.lab.simulation.server import plant

NATURAL = LengthDistribution([3, 5, 8, 8, 13, 21, 34, 40])


def model(**changes) -> EngineModel:
    """Costs are dyadic fractions, so that sums are exact in any order. A step is a second."""
    costs = dict(
        step_seconds=1.0,
        step_seconds_per_sequence=0.0,
        step_seconds_per_context_token=0.0,
        prefill_seconds_per_token=0.0,
        max_sequences=1000,
        block_size=4,
    )
    return EngineModel(**{**costs, **changes})


COSTLY = dict(step_seconds_per_sequence=2**-5, step_seconds_per_context_token=2**-10, prefill_seconds_per_token=2**-6)


def setup(schedule: str = 'stream', **changes) -> Setup:
    of_trees = {*TreeConfig.model_fields, *PLACES, 'stop_at_repetition'} - {'seed'}
    tree = {key: changes.pop(key) for key in list(changes) if key in of_trees}
    config = flat(**{'segment_length': 8, 'max_depth': 4, **tree})
    values = dict(prompts=3, width=4, prompt_tokens=6, lengths=LengthDistribution.fixed(config.max_response_tokens))
    return Setup(config, schedule, **{**values, **changes})


configs = st.fixed_dictionaries(
    {
        'segment_length': st.integers(1, 12),
        'max_depth': st.integers(1, 5),
        'divergence': st.integers(1, 3),
        'root_divergence': st.integers(1, 4),
        'pacing': st.sampled_from(['eager', 'even']),
        'fallback': st.sampled_from(['random_segment', 'random_token', 'root']),
        'fork_position': st.sampled_from(['boundary', 'boundary', 'min_logprob_token', 'max_entropy_token']),
    }
)
batches = st.fixed_dictionaries(
    {
        'prompts': st.integers(1, 8),
        'width': st.integers(1, 8),
        'prompt_tokens': st.integers(1, 9),
        'lengths': st.sampled_from([NATURAL, LengthDistribution.fixed(60)]),
        'data_parallel': st.integers(1, 3),
        'priority': st.booleans(),
        'admission': st.booleans(),
        'seed': st.integers(0, 5),
    }
)
schedules = st.sampled_from(['independent', 'lockstep', 'stream'])
engines = st.fixed_dictionaries(
    {
        'max_sequences': st.sampled_from([1, 3, 1000]),
        # The longest response has 60 tokens and the longest prompt 9.
        'kv_tokens': st.sampled_from([0, 69, 100, 200]),
        'block_size': st.sampled_from([1, 4]),
    }
)

# The engine model.


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 50), st.integers(0, 9))
def test_many_steps_take_as_long_as_one_after_the_other(steps, sequences, context, prefill):
    costly = model(step_seconds_per_kv_token=2**-9, **COSTLY)
    single = [
        costly.seconds(
            1,
            sequences=sequences,
            context=2 * context + i * sequences,
            kv=context + i * sequences,
            prefill=0 if i else prefill,
        )
        for i in range(steps)
    ]
    whole = costly.seconds(steps, sequences=sequences, context=2 * context, kv=context, prefill=prefill)
    assert whole == sum(single)


def test_an_engine_model_survives_its_file(tmp_path):
    saved = model(kv_tokens=1000, event_seconds=1e-4, hardware='1 x H100', **COSTLY)
    saved.to_json(tmp_path / 'engine.json')
    assert EngineModel.from_json(tmp_path / 'engine.json') == saved


@pytest.mark.parametrize(
    'change, message',
    [
        ({'step_seconds': 0}, r'EngineModel.step_seconds=0: must be a finite number above 0'),
        ({'step_seconds': math.nan}, 'step_seconds=nan'),
        ({'prefill_seconds_per_token': -1}, 'prefill_seconds_per_token=-1: must be a finite number of at least 0'),
        ({'max_sequences': 2.5}, 'max_sequences=2.5: must be an integer above 0'),
        ({'block_size': True}, 'block_size=True'),
        ({'hardware': 3}, 'hardware=3: must be a string'),
        ({'speed': 1}, r"unknown keys \['speed'\], missing keys \[\]. Allowed are: step_seconds, "),
        ({'step_seconds': None}, 'step_seconds=None'),
    ],
)
def test_a_wrong_engine_model_is_refused(tmp_path, change, message):
    file = tmp_path / 'engine.json'
    file.write_text(json.dumps(dataclasses.asdict(model()) | change))
    with pytest.raises(ValueError, match=f'engine.json: .*{message}'):
        EngineModel.from_json(file)


@pytest.mark.parametrize('text, message', [('[1]', 'JSON object'), ('{', 'not JSON'), ('{}', 'missing keys.*step')])
def test_what_is_no_engine_model_is_refused(tmp_path, text, message):
    (tmp_path / 'engine.json').write_text(text)
    with pytest.raises(ValueError, match=f'engine.json: .*{message}'):
        EngineModel.from_json(tmp_path / 'engine.json')


# By hand.


@pytest.mark.parametrize('schedule', ['independent', 'stream'])
def test_one_sequence_on_an_idle_engine(schedule):
    done = simulate(model(**COSTLY), setup(schedule, prompts=1, width=1))
    # 32 tokens behind 6: each step attends to what is there before it.
    assert done.seconds == 32 * (1 + 2**-5) + 2**-10 * sum(range(6, 38)) + 2**-6 * 6
    assert (done.trajectories, done.decoded_tokens, done.requests, done.prefill_tokens) == (1, 32, 1, 6)
    assert done.segments == (1 if schedule == 'independent' else 4)


def test_one_sequence_segment_by_segment_computes_the_end_of_its_prefix_again():
    done = simulate(model(**COSTLY), setup('lockstep', prompts=1, width=1))
    # Prefixes of 14, 22 and 30 tokens after 12, 20 and 28 in whole blocks.
    assert done.prefill_tokens == 6 + 3 * 2
    assert done.seconds == 32 * (1 + 2**-5) + 2**-10 * sum(range(6, 38)) + 2**-6 * 12


def test_what_sequences_share_is_read_once():
    done = simulate(model(step_seconds_per_kv_token=2**-10), setup('independent', prompts=2, width=3))
    # Two prompts of 6, and the tokens of six answers.
    assert done.seconds == 32 + 2**-10 * sum(2 * 6 + 6 * i for i in range(32))


def test_an_engine_may_be_started_otherwise_than_the_one_that_was_measured():
    limits = dict(max_sequences=2, kv_tokens=69, block_size=2)
    assert simulate(model(**COSTLY), setup(**limits)) == simulate(model(**limits, **COSTLY), setup())


def test_independent_sampling_of_equal_sequences():
    done = simulate(model(**COSTLY), setup('independent', prompts=2, width=3))
    # The prompt of 6 is computed once, and its last, partial block again by the two that share it.
    prefill = 2 * (6 + 2 * 2)
    assert done.prefill_tokens == prefill
    assert done.seconds == 32 * (1 + 6 * 2**-5) + 6 * 2**-10 * sum(range(6, 38)) + 2**-6 * prefill
    assert done.peak_kv_tokens == 2 * 6 + 6 * 32
    assert done.trajectories_per_second == 6 / done.seconds and done.mean_running == 6


def test_sequences_wait_for_a_place_in_the_batch():
    done = simulate(model(max_sequences=4), setup('independent', prompts=5, width=1))
    assert (done.seconds, done.tail_seconds, done.mean_running) == (64, 32, 2.5)
    assert (done.latency_p50, done.latency_p95, done.latency_p99, done.latency_max) == (32, 64, 64, 64)


def test_a_fork_starts_when_the_engine_has_handed_its_prefix_out():
    tree = dict(prompts=1, width=2, root_divergence=1, max_depth=2)
    # The 9th token tells that the first 8 are there, the next step has begun by then, and the fork takes 8 steps.
    assert simulate(model(), setup('stream', **tree)).seconds == 9 + 1 + 8
    # Alone on its engine, a request of the next segment waits for nothing.
    assert simulate(model(), setup('lockstep', **tree)).seconds == 8 + 8


class Lengths:
    """Draws these lengths one after the other."""

    def __init__(self, *lengths: int) -> None:
        self._lengths = list(lengths)

    def draw(self, rng: random.Random, longer_than: int = 0) -> int:
        return self._lengths.pop(0)


def test_new_requests_wait_for_the_step_that_runs():
    def latencies(schedule: str) -> tuple[float, float]:
        # The first path of tree 1 ends at 5, and the next begins after step 6 and takes 8 steps. That of tree 2 is cut
        # at 16, and another of 3 follows it when nothing else runs.
        what = setup(
            schedule,
            prompts=2,
            width=2,
            max_depth=2,
            divergence=1,
            root_divergence=1,
            fallback='root',
            lengths=Lengths(5, 16, 8, 3),
        )
        done = simulate(model(), what)
        return done.latency_p50, done.latency_max

    assert latencies('stream') == (6 + 8, 16 + 3)
    # The second segment of tree 2 begins after step 9.
    assert latencies('lockstep') == (6 + 8, 9 + 8 + 3)


def test_shared_tokens_are_in_the_kv_cache_once():
    done = simulate(model(), setup('lockstep', prompts=1, width=4, root_divergence=4, max_depth=1))
    assert done.peak_kv_tokens == 6 + 4 * 8
    done = simulate(model(), setup('lockstep', prompts=1, width=4, root_divergence=1, divergence=4, max_depth=2))
    assert done.peak_kv_tokens == 6 + 8 + 4 * 8 and done.prefill_tokens == 6 + 4 * (14 - 12)


def test_the_event_loop_sets_the_pace_where_it_is_slower():
    free = simulate(model(), setup(prompts=2))
    slow = model(event_seconds=4.0, request_seconds=0.5)
    busy = simulate(slow, setup(prompts=2))
    cpu = 4.0 * free.segments + 0.5 * free.requests
    assert free.event_loop_utilisation == 0 and busy.event_loop_utilisation == cpu / free.seconds > 1
    assert busy.seconds == busy.latency_max == pytest.approx(cpu)
    # Two servers have two event loops.
    assert simulate(slow, setup(prompts=2, servers=2)).seconds == pytest.approx(cpu / 2)


# Laws.


@given(configs, batches, schedules, engines)
@settings(deadline=None)
def test_every_tree_is_grown_and_every_token_takes_a_step(config, batch, schedule, engine):
    done = simulate(model(**engine), setup(schedule, **config, **batch))
    assert done.trajectories == batch['prompts'] * batch['width']
    # A running sequence gives a token in each step of a second.
    assert done.mean_running * done.seconds * batch['data_parallel'] == pytest.approx(done.decoded_tokens)
    assert done.latency_p50 <= done.latency_p95 <= done.latency_p99 <= done.latency_max == done.seconds
    assert 0 <= done.tail_seconds < done.seconds
    if engine['kv_tokens']:
        assert done.peak_kv_tokens <= engine['kv_tokens']
    if schedule == 'independent':
        assert done.decoded_tokens == done.trajectory_tokens and done.segments == done.requests == done.trajectories


class OneStepAtATime(SimulatedEngine):
    def schedule(self) -> None:
        super().schedule()
        if self._running:
            self._ahead = 1
            self.next_time = self.time + self._seconds(1)


@given(configs, batches, schedules, engines)
@settings(max_examples=50, deadline=None)
def test_a_running_request_holds_all_of_its_tokens_and_each_is_in_the_cache_once(config, batch, schedule, engine):
    """Also of a segment that was split while paths through it run."""

    class Checked(SimulatedEngine):
        def schedule(self):
            super().schedule()
            kept = {k for request in self._running for k in request.held}
            assert self._held == sum(k.tokens for k in kept)
            for request in self._running:
                assert sum(k.tokens for k in request.held) + request.unreported == request.context
                path = request.prefix.lineage()
                nodes = [request.tree.kept[node].tokens for node in path if node in request.tree.kept]
                assert len(nodes) < len(path) or nodes == [len(node.token_ids) for node in path]

    with mock.patch('treepo_swift.lab.simulation.server.SimulatedEngine', Checked):
        simulate(model(**COSTLY, **engine), setup(schedule, **config, **batch))


@given(configs, batches, schedules, engines)
@settings(deadline=None)
def test_jumping_over_steps_changes_nothing(config, batch, schedule, engine):
    costly, what = model(**engine, **COSTLY), setup(schedule, **config, **batch)
    with mock.patch('treepo_swift.lab.simulation.server.SimulatedEngine', OneStepAtATime):
        slowly = simulate(costly, what)
    assert simulate(costly, what) == slowly


@given(configs, batches)
@settings(deadline=None)
def test_all_engines_and_schedules_grow_the_same_trees(config, batch):
    lockstep = simulate(model(), setup('lockstep', **config, **batch))
    stream = simulate(model(kv_tokens=100, max_sequences=3), setup('stream', **config, **{**batch, 'data_parallel': 2}))
    for name in ('trajectories', 'trajectory_tokens', 'decoded_tokens', 'segments'):
        assert getattr(stream, name) == getattr(lockstep, name)


@given(configs, st.integers(1, 4), st.integers(1, 8))
@settings(deadline=None)
def test_tokens_are_those_that_the_searches_count(config, prompts, width):
    what = setup(prompts=prompts, width=width, **config, answer='none', stop_at_repetition=False)
    searches = [
        grow(plant(what, number).search, answer=lambda request: segment_of([97] * request.max_tokens))
        for number in range(prompts)
    ]
    done = simulate(model(), what)
    assert done.decoded_tokens == sum(search.tree.stats.decoded_tokens for search in searches)
    assert done.trajectory_tokens == sum(search.tree.stats.trajectory_tokens for search in searches)


@given(configs, st.integers(1, 6), st.integers(1, 8), st.sampled_from([0.0, 2**-6]))
@settings(deadline=None)
def test_stream_is_slower_than_lockstep_by_the_delay_of_its_forks_at_most(config, prompts, width, prefill):
    # Without CPU time a boundary costs lockstep a step at most, and the fork of a fork of a fork two steps each.
    what = dict(config, prompts=prompts, width=width)
    stream, lockstep = (
        simulate(model(prefill_seconds_per_token=prefill), setup(schedule, **what))
        for schedule in ('stream', 'lockstep')
    )
    assert stream.prefill_tokens <= lockstep.prefill_tokens
    assert stream.seconds <= lockstep.seconds + 2 * stream.segments / prompts


@pytest.mark.parametrize('schedule', ['independent', 'lockstep', 'stream'])
@pytest.mark.parametrize('more', ['servers', 'data_parallel'])
def test_twice_the_engines_take_half_the_time(schedule, more):
    what = dict(prompts=60, lengths=NATURAL)
    one = simulate(model(max_sequences=8), setup(schedule, **what))
    two = simulate(model(max_sequences=8), setup(schedule, **what, **{more: 2}))
    assert 0.5 <= two.seconds / one.seconds < 0.6
    assert two.decoded_tokens == one.decoded_tokens


@given(configs, batches, schedules, engines)
@settings(deadline=None, max_examples=20)
def test_one_seed_one_result(config, batch, schedule, engine):
    what = setup(schedule, **config, **batch)
    assert simulate(model(**engine, **COSTLY), what) == simulate(model(**engine, **COSTLY), what)


def test_another_seed_draws_other_lengths():
    assert len({simulate(model(), setup(lengths=NATURAL, seed=seed)).trajectory_tokens for seed in range(5)}) > 1


# A KV cache that is too small.

SMALL = dict(kv_tokens=300, prefill_seconds_per_token=2**-4)
CROWD = dict(prompts=20, width=4, lengths=NATURAL)


@pytest.mark.parametrize('schedule', ['independent', 'lockstep', 'stream'])
def test_requests_that_outgrow_the_cache_are_preempted_and_computed_again(schedule):
    roomy = simulate(model(**{**SMALL, 'kv_tokens': 0}), setup(schedule, admission=False, **CROWD))
    small = simulate(model(**SMALL), setup(schedule, admission=False, **CROWD))
    assert roomy.preemptions == 0 < small.preemptions
    assert roomy.peak_kv_tokens > 300 >= small.peak_kv_tokens
    assert roomy.prefill_tokens < small.prefill_tokens and roomy.seconds < small.seconds
    assert roomy.decoded_tokens == small.decoded_tokens


def test_a_preempted_request_computes_all_its_tokens_again():
    # Prompts of 6 and responses of 32: both fit until they have 13 tokens each, then the second waits for the first.
    done = simulate(model(kv_tokens=38), setup('independent', prompts=2, width=1))
    assert done.preemptions == 1
    assert done.prefill_tokens == 6 + 6 + (6 + 13)
    assert (done.latency_p50, done.latency_max, done.peak_kv_tokens) == (32, 32 + 32 - 13, 38)


def test_admission_lets_trees_wait_instead():
    waiting = simulate(model(**SMALL), setup(**CROWD))
    preempted = simulate(model(**SMALL), setup(admission=False, **CROWD))
    assert waiting.preemptions < preempted.preemptions and waiting.mean_running < preempted.mean_running
    assert waiting.decoded_tokens == preempted.decoded_tokens
    # A tree that is larger than the cache gets an engine of its own.
    alone = simulate(model(kv_tokens=40), setup(prompts=3, lengths=LengthDistribution.fixed(32)))
    assert alone.latency_max == pytest.approx(3 * alone.latency_p50 / 2)


def test_the_oldest_trees_are_done_earlier_where_they_go_first():
    by_arrival, by_age = (
        simulate(model(**SMALL), setup(admission=False, priority=priority, **CROWD)) for priority in (False, True)
    )
    assert by_age.latency_p50 < by_arrival.latency_p50
    assert by_age.prefill_tokens < by_arrival.prefill_tokens and by_age.seconds < by_arrival.seconds


# What else a setup may say.


def test_trees_that_share_a_budget_wait_for_each_other():
    what = dict(prompts=4, width=4, budget='by_segment_tokens', budget_tokens=4 * 8, data_parallel=2)
    stream, lockstep = (simulate(model(), setup(schedule, **what)) for schedule in ('stream', 'lockstep'))
    assert stream.trajectories == lockstep.trajectories == 16
    # A segment a tree at each depth, and more when other trees are done.
    assert lockstep.seconds > 2 * simulate(model(), setup('lockstep', prompts=4, width=4)).seconds
    assert stream.decoded_tokens == lockstep.decoded_tokens


@pytest.mark.parametrize('branching', ['logprob', 'entropy'])
def test_policies_that_weigh_paths_see_ties(branching):
    assert simulate(model(), setup(branching=branching, fallback='min_logprob_token')).trajectories == 12


def test_servers_without_prompts_idle():
    three, eight = (simulate(model(), setup(servers=servers)) for servers in (3, 8))
    assert eight.seconds == three.seconds and eight.mean_running == pytest.approx(three.mean_running * 3 / 8)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'prompts': 0}, 'prompts=0: must be at least 1'),
        ({'schedule': 'eager'}, "schedule='eager': must be independent, lockstep or stream"),
        ({'max_tokens': -1}, 'max_tokens=-1'),
    ],
)
def test_an_impossible_setup_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        setup(**change)


def test_a_cache_for_less_than_one_response_is_refused():
    with pytest.raises(ValueError, match='kv_tokens=37: the KV cache must hold .*38 in all'):
        simulate(model(kv_tokens=37), setup())


# The command.


def bench_file(tmp_path, workload: str, seconds: dict[str, float], **settings) -> str:
    config = flat(segment_length=8, max_depth=4).to_dict()
    settings = dict(prompts=3, width=4, prompt_tokens=6.4, config=config, workload=workload, max_tokens=32, **settings)
    modes = {mode: {'seconds': {'median': median}} for mode, median in seconds.items()}
    file = tmp_path / f'{workload}.json'
    file.write_text(json.dumps({'hardware': 'x', 'settings': settings, 'lengths': [5, 32], 'modes': modes}))
    return str(file)


def command(tmp_path, *options: str) -> int:
    model(hardware='1 x Test').to_json(tmp_path / 'engine.json')
    return main(['simulate', '--engine', str(tmp_path / 'engine.json'), *options])


def test_a_sweep_is_a_row_for_every_combination(tmp_path, capsys):
    found = tmp_path / 'found.json'
    sweeps = '--prompts 2 --depth 4 --segment 8,16 --pacing eager,even --prompt-tokens 6'
    assert command(tmp_path, *sweeps.split(), '--json', str(found)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith('1 x Test; prompts 2, W 16, D 4, d 2, root d 2, servers 1,')
    assert printed.count('\n') == 1 + 2 + 6 + 1
    rows = json.loads(found.read_text())['rows']
    # Independent sampling knows no pacing.
    assert [[row['settings'][key] for key in ('schedule', 'S', 'pacing')] for row in rows] == [
        ['stream', 8, 'eager'],
        ['independent', 8, None],
        ['stream', 8, 'even'],
        ['stream', 16, 'eager'],
        ['independent', 16, None],
        ['stream', 16, 'even'],
    ]
    assert rows[0]['result'] == dataclasses.asdict(simulate(model(), setup(prompts=2, width=16)))


def test_sweeps_read_config_and_lengths(tmp_path):
    tree, lengths, found = (tmp_path / name for name in ('tree.yaml', 'lengths.json', 'found.json'))
    tree.write_text('segment_length: 8\nmax_depth: 4\ndivergence: 3\n')
    lengths.write_text('[3, 5]')
    files = ['--config', str(tree), '--lengths', str(lengths), '--json', str(found)]
    assert command(tmp_path, *files, '--schedule', 'lockstep', '--priority', '--no-admission', '--seed', '3') == 0
    settings = json.loads(found.read_text())['rows'][0]['settings']
    assert [settings[key] for key in ('D', 'S', 'd', 'mean length', 'order', 'admission', 'seed')] == [
        4,
        8,
        3,
        4,
        'priority',
        False,
        3,
    ]


def test_predictions_stand_beside_measurements(tmp_path, capsys):
    fixed = bench_file(tmp_path, 'fixed', {'independent': 40.0, 'example': 9.0})
    engine = {'ranks': 2, 'max_num_seqs': 3, 'kv_tokens': 100, 'block_size': 2}
    natural = bench_file(tmp_path, 'natural', {'stream': 20.0}, engine=engine)
    assert command(tmp_path, '--validate', fixed, natural) == 0
    printed = capsys.readouterr().out
    assert '40.00' in printed and '32.00' in printed and '-20.0%' in printed and 'example' not in printed
    (measured,) = read_bench(natural)
    started = dict(data_parallel=2, max_sequences=3, kv_tokens=100, block_size=2)
    assert measured.setup == setup('stream', lengths=LengthDistribution([5, 32]), max_tokens=32, **started)
    predicted = simulate(model(), measured.setup).seconds
    assert f'mean absolute error {(0.2 + abs(predicted / 20 - 1)) / 2:.1%}' in printed


@pytest.mark.parametrize(
    'options, message',
    [
        (['--engine', 'nowhere.json'], 'nowhere.json: No such file or directory.'),
        (['--depth', '4x'], '--depth 4x: must be integers, separated by commas.'),
        (['--width', '0'], 'width=0: must be at least 1.'),
        (['--pacing', 'odd'], "pacing='odd': must be 'eager' or 'even'"),
        (['--validate', 'nowhere.json'], 'nowhere.json: No such file or directory.'),
    ],
)
def test_wrong_options_are_one_clear_line(tmp_path, capsys, options, message):
    assert command(tmp_path, *options) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f'treepo-swift simulate: {message}') and printed.err.count('\n') == 1


@pytest.mark.parametrize(
    'path, value, message',
    [
        (['settings'], None, "'settings' is missing or of a wrong type"),
        (['settings', 'prompts'], 'three', "'prompts' is missing or of a wrong type"),
        (['settings', 'config'], {'depth': 3}, "unknown key 'depth'"),
        (['lengths'], [], 'non-empty list'),
        (['modes', 'stream', 'seconds', 'median'], 0, "mode 'stream' is 0: must be above 0"),
    ],
)
def test_a_wrong_bench_result_is_refused(tmp_path, path, value, message):
    file = tmp_path / 'natural.json'
    whole = part = json.loads(open(bench_file(tmp_path, 'natural', {'stream': 1.0})).read())
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    file.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=f'natural.json: .*{message}'):
        read_bench(file)
