"""What every ``tree/*`` metric means, what is healthy, and what to turn where it is not: docs/metrics.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the table. The names are stable: dashboards are built on them."""

    name: str
    unit: str
    meaning: str
    healthy: str
    turn: str
    """What to change where it is not healthy."""


SAVING, ENGINE, LEARNING, FAULTS, TRAINING = 'What trees save', 'Engine', 'Learning', 'Faults', 'Training'
"""Sections of the table, in order."""

METRICS: dict[str, tuple[Metric, ...]] = {
    SAVING: (
        Metric(
            'tree/saved_fraction',
            'share',
            'tokens that the answers share and that were decoded once',
            '0.2 to 0.5',
            'low: answers are short against `segment_length` (lower it), or `root_divergence` is high; `pacing: even` '
            'forks later and shares more',
        ),
        Metric(
            'tree/saved_tokens', 'tokens', '`independent_tokens - decoded_tokens`', 'above 0', 'as `saved_fraction`'
        ),
        Metric('tree/decoded_tokens', 'tokens', 'sampled by the engine for this batch', '', ''),
        Metric('tree/independent_tokens', 'tokens', 'what the same answers cost one by one', '', ''),
        Metric('tree/rounds', 'count', 'rollouts that this batch took', '1', 'above: `--dynamic_sample` resamples'),
        Metric('tree/trees', 'count', 'trees of all rounds', 'prompts of a step', ''),
        Metric(
            'tree/depth',
            'segments',
            'mean length of a trajectory',
            '3 and more',
            'below 2 a tree has no room to fork: lower `segment_length`',
        ),
        Metric('tree/forks', 'count', 'branches that began at a live path', '', ''),
        Metric(
            'tree/fallbacks',
            'count',
            'branches that began in a finished trajectory, to fill a tree up',
            'below a third of the trajectories',
            'many: paths end before they fork; lower `segment_length`, or raise `root_divergence`',
        ),
        Metric('tree/turns', 'count', 'turns begun after an environment had spoken', '', ''),
        Metric('tree/environment_tokens', 'tokens', 'said by environments: masked, not trained on', '', ''),
        Metric(
            'tree/replayed_turns',
            'count',
            'turns played again to rebuild a state',
            '0 with `fork_state: copy`',
            'many: make the state copyable',
        ),
    ),
    ENGINE: (
        Metric('tree/rollout_seconds', 's', 'from the requests to the outputs, of the slowest server', '', ''),
        Metric(
            'tree/scheduler_cpu_share',
            'share',
            'CPU time of the scheduler on the event loop, hooks and templates not counted',
            'below 0.3',
            'above 0.7 the event loop holds the engines up: fewer engines behind a server, more servers (scale.md)',
        ),
        Metric('tree/engine_requests', 'count', 'requests sent: one a path', '', ''),
        Metric(
            'tree/prefix_hit_rate',
            'share',
            'input tokens of the requests that vLLM had in its KV cache',
            'above 0.8',
            'low: `--vllm_enable_prefix_caching true`, and `segment_length` a multiple of the KV block',
        ),
        Metric(
            'tree/evicted_tokens',
            'tokens',
            'input tokens that the tree had computed and vLLM had to compute again',
            'near 0',
            'high: the KV cache is short. More `--vllm_gpu_memory_utilization`, fewer prompts a step or a server',
        ),
        Metric(
            'tree/engine_prefix_hit_rate',
            'share',
            'of the whole engine, as vLLM counts; needs `disable_log_stats: false` in `--vllm_engine_kwargs`',
            'above 0.5',
            'as `prefix_hit_rate`',
        ),
        Metric(
            'tree/engine_preemptions',
            'count',
            'requests that gave up their KV blocks and began again (same condition)',
            '0',
            'as `evicted_tokens`',
        ),
    ),
    LEARNING: (
        Metric(
            'tree/flat_trees',
            'share',
            'trees whose rewards are all alike: they teach nothing',
            'below 0.5',
            'high: prompts are too easy or too hard; `--dynamic_sample true` replaces them; more first branches',
        ),
        Metric(
            'tree/flat_subgroups',
            'share',
            'the same of subgroups of two and more below the root',
            '',
            'high: forks come after the answer is decided; fork earlier (`pacing: eager`) or at entropy (`branching`)',
        ),
        Metric(
            'tree/contrast',
            'share',
            "reward variance between a tree's first branches; the rest lies below them. Flat trees are left out",
            '',
            'near 1: what decides is said before the first fork, and forks teach nothing: raise `root_divergence`',
        ),
        Metric(
            'tree/stop/<reason>',
            'share',
            'trajectories that ended so: `eos`, `answer`, `repetition`, `token_limit`, `depth_limit`, ...',
            '`eos` and `answer` above 0.8',
            'many `token_limit` or `depth_limit`: answers do not fit; many `repetition`: the model loops (temperature)',
        ),
    ),
    FAULTS: (
        Metric(
            'tree/failures',
            'count',
            'paths that failed: engine, hook or policy. In an evaluation (`eval_tree/failures`): answers',
            '0',
            "the server's log names causes and counts; reliability.md lists them",
        ),
        Metric(
            'tree/hung_hooks',
            'count',
            'threads of hooks that had not come back when the batch ended',
            '0',
            'give the hook a timeout of its own; `faults.max_hung_hooks` ends the run',
        ),
        Metric(
            'tree/sync_gap',
            'nats',
            'difference of log-probs between trainer and the farthest engine after a weight sync',
            'like the first sync',
            'grows: the engine has other weights; the run ends when noise can not explain it',
        ),
        Metric('tree/proof_seconds', 's', 'what that comparison took', '2 % of the step', ''),
    ),
    TRAINING: (
        Metric(
            'tree/train_token_ratio',
            'ratio',
            "tokens of the trainer's rows for each token that was computed; 1 where nothing was shared",
            'above 1.3',
            '1: the log says why sharing is off; else larger micro-batches or `shared_prefix.max_tokens`',
        ),
        Metric(
            'tree/padding_ratio',
            'ratio',
            "tokens of swift's batches, padding included, per row token",
            '',
            'padding_free',
        ),
        Metric('tree/policy_seconds', 's', 'forward of the policy pass of a micro-batch', '', ''),
        Metric('tree/logprob_seconds', 's', 'a pass without gradients: old, reference, teacher', '', ''),
    ),
}
"""Section -> its metrics."""


def markdown() -> str:
    """The tables, a heading for each section."""
    parts = []
    for section, metrics in METRICS.items():
        rows = [
            f'| `{m.name}` | {m.unit} | {m.meaning} | {m.healthy or "-"} | {m.turn or "-"} |'.replace('<', r'\<')
            for m in metrics
        ]
        head = ['| metric | unit | what it is | healthy | what to turn |', '| --- | --- | --- | --- | --- |']
        parts.append('\n'.join([f'## {section}', '', *head, *rows]))
    return '\n\n'.join(parts) + '\n'
