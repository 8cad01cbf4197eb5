"""Proof that the rollout server follows the trainer's weights.

swift's server answers 200 to a weight sync that failed, and rollouts then come from old or half-old weights: reward
stays flat and nothing says why. At the first sync both sides hold the same weights anyway, so agreement there
proves little: the comparison is made at every sync (one short request and one short forward pass), and counts as proof
once the policy has visibly moved and the server with it.
"""

from __future__ import annotations

from collections.abc import Sequence

TOLERANCE = {'float32': 2e-3, 'float16': 2e-2, 'bfloat16': 6e-2}
"""Mean absolute log-prob difference that two engines of the same weights may show, in nats per token."""
PROOF_FACTOR = 4.0
"""How many tolerances the policy must have moved before agreement counts as proof."""

PROBE_TEXT = (
    'Question: What is 12 + 30 + 7? Let us go step by step. First, 12 + 30 = 42. Then, 42 + 7 = 49. '
    'The answer is \\boxed{49}.'
)
MAX_PROBE_TOKENS = 128


class WeightSyncError(RuntimeError):
    """The rollout server does not sample from the trainer's weights."""


class WeightSyncProof:
    """Compares log-probs of one fixed text after every sync."""

    def __init__(self, dtype: str) -> None:
        self.tolerance = TOLERANCE.get(dtype.removeprefix('torch.'), TOLERANCE['bfloat16'])
        self.proven = False
        """Whether the policy has moved far enough, at some check, for agreement to mean something."""
        self.gap = 0.0
        """Last mean absolute difference between server and trainer."""
        self.drift = 0.0
        """Mean absolute change of the trainer's own log-probs since the first check."""
        self._first: list[float] | None = None

    def check(self, trainer: Sequence[float], server: Sequence[float], *, where: str) -> None:
        """Take both sides' log-probs of the same tokens; raise `WeightSyncError` where they tell of different weights.

        Args:
            trainer: log-probs under the trainer's current policy, one per token.
            server: the same tokens' log-probs as the server computes them after the sync.
            where: which server and step, for the message.
        """
        if len(trainer) != len(server):
            raise WeightSyncError(f'{where}: {len(server)} log-probs came back for {len(trainer)} tokens.')
        self._first = self._first or list(trainer)
        self.gap = _mean_gap(trainer, server)
        self.drift = _mean_gap(trainer, self._first)
        if not self.gap <= self.tolerance:
            raise WeightSyncError(
                f"{where}: the server does not sample from the trainer's weights. Log-probs of a fixed text differ by "
                f'{self.gap:.4g} nats per token, {self.tolerance:g} is allowed (the policy itself has moved by '
                f"{self.drift:.4g} since the first sync). A weight sync failed, and swift's server does not tell: "
                "look for an exception in the rollout server's log. Restart it before you train on. If both sides "
                'run in different precisions by intention, set TREEPO_CHECKS__VERIFY_WEIGHT_SYNC=false.'
            )
        self.proven = self.proven or self.drift >= PROOF_FACTOR * self.tolerance


def _mean_gap(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / max(len(a), 1)
