"""The weight-sync proof on simulated engines: how often it stops a healthy run, and when it finds a sick server.

The policy's log-probs of the probe text walk in random steps from 0 to 1 nat. Both engines see them with noise that is
half the same at every sync and half new, has heavy tails, is partly common to all tokens, and grows as log-probs do.
Over 60 syncs of 50 tokens, and every noise and drift below: no healthy run was stopped (0 of 1,000), and a server that
kept its first weights was refused in all runs whose policy moved by six times the noise. See `FOUND_AT`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median

import pytest

from treepo_swift.trainer.weight_sync import ServerProof, WeightSyncError, WeightSyncProof, coarsest

TOKENS, SYNCS = 50, 60
NOISE = {
    'float32 both': ('float32', 1e-6),
    'float32 both, TF32': ('float32', 1e-3),
    'bfloat16 both, the same kernels': ('bfloat16', 0.005),
    'bfloat16 server, float32 trainer': ('bfloat16', 0.02),
    'float8 server': ('bfloat16', 0.1),
}
"""Name -> the coarser type, and the noise of one engine against the other in nats per token."""
FOUND_AT = {
    'float32 both': 0.001,
    'float32 both, TF32': 0.006,
    'bfloat16 both, the same kernels': 0.03,
    'bfloat16 server, float32 trainer': 0.12,
    'float8 server': 0.6,
}
"""By this drift a server with old weights is refused, in each of the runs below: at about six times the noise."""


@dataclass
class Run:
    """One training: what the policy's log-probs are at each sync, and what each engine makes of them."""

    seed: int
    noise: float
    drift: float
    """Mean absolute change of the policy's log-probs over the whole training."""

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        common, step = self.bell(), [0.0] * TOKENS
        self.policy = [[-2.0] * TOKENS]
        for _ in range(SYNCS - 1):
            step = [0.5 * c + s for c, s in zip(common, self.bell())]
            self.policy.append([p + s for p, s in zip(self.policy[-1], step)])
        scale = self.drift / self.moved(SYNCS - 1)
        self.policy = [[-2 + scale * (p + 2) for p in policy] for policy in self.policy]
        self.fixed = self.bell()

    def bell(self) -> list[float]:
        return [self.rng.gauss(0, 1) for _ in range(TOKENS)]

    def moved(self, sync: int) -> float:
        return fmean(abs(p - q) for p, q in zip(self.policy[sync], self.policy[0]))

    def seen(self, logprobs: list[float], sync: int) -> list[float]:
        """The server's view of `logprobs`."""
        scale = self.noise * (1 + self.moved(sync))
        common = 0.5 * self.rng.gauss(0, 1)
        fresh = [(common + v) / (0.5 + self.rng.random()) for v in self.bell()]
        return [p + scale * 0.7 * (f + x) for p, f, x in zip(logprobs, fresh, self.fixed)]

    def check(self, held: Callable[[int], list[float]]) -> tuple[int | None, bool]:
        """The sync at which a server that holds these weights' log-probs is refused, and whether it ever was proven."""
        proof = ServerProof()
        dtype = 'float32' if self.noise < 0.002 else 'bfloat16'
        for sync in range(SYNCS):
            try:
                proof.check(self.policy[sync], self.seen(held(sync), sync), dtype=dtype, where='s')
            except WeightSyncError:
                return sync, proof.proven
        return None, proof.proven


@pytest.mark.parametrize('name', NOISE)
def test_a_server_that_follows_is_never_refused(name):
    """1,000 runs in all; proven wherever the policy has moved far enough."""
    dtype, noise = NOISE[name]
    for drift in (0.0, 0.01, 0.1, 1.0):
        for seed in range(50):
            run = Run(seed, noise, max(drift, 1e-12))
            refused, proven = run.check(lambda sync, run=run: run.policy[sync])
            assert refused is None, (drift, seed)
            assert proven or drift < FOUND_AT[name] * 1.2
            assert not proven or drift > noise / 2


@pytest.mark.parametrize('name', NOISE)
@pytest.mark.parametrize('since', [0, 20])
def test_a_server_that_keeps_its_weights_is_refused_before_the_policy_has_moved_far(name, since):
    dtype, noise = NOISE[name]
    for seed in range(20):
        run = Run(seed, noise, min(12 * FOUND_AT[name], 4.0))
        refused, _ = run.check(lambda sync, run=run: run.policy[min(sync, since)])
        assert refused is not None and refused > since
        steps = [abs(p - q) for p, q in zip(run.policy[refused - 1], run.policy[since])]
        assert fmean(steps) < FOUND_AT[name] * (1 + run.moved(refused))


def test_half_old_weights_are_refused():
    """Half of the layers took the new weights: the server makes half of the trainer's movement."""
    for dtype, noise in NOISE.values():
        found = []
        for seed in range(20):
            run = Run(seed, noise, min(60 * noise + 0.02, 4.0))
            refused, _ = run.check(lambda sync, run=run: [(p - 2) / 2 for p in run.policy[sync]])
            found.append(refused)
        assert None not in found and median(found) < SYNCS - 1, (dtype, noise)


def test_a_lost_tensor_is_refused_where_noise_does_not_hide_it():
    """It moves log-probs by a twentieth of the policy's drift. In bfloat16 that drowns in the noise."""
    for noise, found in ((1e-6, True), (0.02, False)):
        for seed in range(20):
            run = Run(seed, noise, 0.3)
            lost = run.bell()

            def held(sync: int, run: Run = run, lost: list[float] = lost) -> list[float]:
                return [p + 0.05 * run.moved(sync) * error for p, error in zip(run.policy[sync], lost)]

            assert (run.check(held)[0] is not None) is found


def test_nothing_is_claimed_while_the_policy_has_hardly_moved():
    """A drift of half of the noise: old weights give the same gap as new ones."""
    for seed in range(20):
        run = Run(seed, 0.02, 0.01)
        assert run.check(lambda sync, run=run: run.policy[0]) == (None, False)


FIRST, SECOND = [-1.0, -2.0, -0.5, -3.0] * 4, [-1.1, -2.2, -0.4, -3.3] * 4


def check(proof: WeightSyncProof, trainer: list[float], server: list[float], step: int = 0, **options: str) -> None:
    proof.check(trainer, server, **{'url': 'http://x', 'dtype': 'float32', **options}, step=step)


@pytest.mark.parametrize(
    'server, said',
    [
        (FIRST, 'the server does not sample from .*0.175 nats .* it was 0, .*TREEPO_VERIFY_WEIGHT_SYNC'),
        ([float('nan'), *SECOND[1:]], 'differ by nan nats'),
        (SECOND[1:], '15 log-probs came back for 16 tokens'),
    ],
)
def test_the_message_names_server_step_and_numbers(server, said):
    proof = WeightSyncProof(['torch.float32'])
    check(proof, FIRST, FIRST)
    with pytest.raises(WeightSyncError, match=f'(?s)^http://x, step 1: .*{said}'):
        check(proof, SECOND, server, step=1)


def test_a_server_that_stopped_following_is_told_from_one_that_is_far_off():
    first = FIRST * 6
    proof = WeightSyncProof(['float32'])
    check(proof, first, first)
    check(proof, [value + 0.0003 for value in first], first, step=1)
    with pytest.raises(WeightSyncError, match=r'step 2: .*stopped following.* moved by 0.0006 .* server made 0% of'):
        check(proof, [value + 0.0006 for value in first], first, step=2)


@pytest.mark.parametrize('dtypes, gap, fits', [
    (['float32', 'float32'], 0.02, False),
    (['float32', 'bfloat16'], 0.02, True),
    (['bfloat16', 'float32'], 0.02, True),
    (['float32', None], 0.02, True),
    (['float16', 'float32'], 0.02, True),
    (['float16', 'float32'], 0.1, False),
    (['bfloat16', 'bfloat16'], 0.5, False),
    (['bfloat16', 'bfloat16'], float('nan'), False),
])  # fmt: skip
def test_the_first_gap_must_be_possible_for_both_types(dtypes, gap, fits):
    trainer, server = dtypes
    proof = WeightSyncProof([f'torch.{trainer}'])
    answer = [value + gap for value in FIRST]
    if fits:
        check(proof, FIRST, answer, dtype=server)
        assert proof.worst.noise == pytest.approx(gap) and not proof.proven
    else:
        with pytest.raises(WeightSyncError, match=r'already at the first sync.*Do both sides name the same --model'):
            check(proof, FIRST, answer, dtype=server)


def test_every_server_has_its_own_noise_and_all_must_be_proven():
    proof = WeightSyncProof(['float32'])
    noisy = [value + 0.05 * (-1) ** index for index, value in enumerate(FIRST)]
    check(proof, FIRST, FIRST, url='http://a')
    check(proof, FIRST, noisy, url='http://b', dtype='bfloat16')
    check(proof, SECOND, SECOND, url='http://a', step=1)
    assert not proof.proven and proof.servers['http://a'].proven
    assert proof.worst is proof.servers['http://b']
    far = [value - 1 for value in FIRST]
    check(proof, far, far, url='http://a', step=2)
    check(proof, far, [value + 0.05 * (-1) ** index for index, value in enumerate(far)], url='http://b', step=2)
    assert proof.proven


def test_the_coarsest_type_counts():
    assert coarsest(['torch.float32', 'float16']) == 'float16'
    assert coarsest(['torch.uint8', 'float32']) == 'bfloat16'  # quantised weights
