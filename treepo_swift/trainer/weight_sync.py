"""Proof that the rollout engines, servers or those in the trainer's processes, follow the trainer's weights.

swift's server answers 200 to a weight sync that failed, and rollouts then come from old or half-old weights: reward
stays flat and nothing says why. So after a sync both sides score one fixed text, and their log-probs are compared:
after every sync until one is proven, then after as many as take 2 % of the run's time. Two engines never agree to the
last bit, and by how much they differ depends on their types and kernels. Nobody has to guess that: at the first sync
both sides hold the same weights (of a new run as of a resumed one), so the gap measured there is the noise of these
two engines.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul, sub

PROBE_TEXT = (
    'Question: What is 12 + 30 + 7? Let us go step by step. First, 12 + 30 = 42. Then, 42 + 7 = 49. '
    'The answer is \\boxed{49}.'
)
MAX_PROBE_TOKENS = 128
MAX_SHARE = 0.02
"""Share of a run's time that comparisons may take once a sync has been proven. On long steps every sync is compared."""


@dataclass(frozen=True, slots=True)
class Precision:
    """What is to be expected of engines that compute in a type, in nats per token."""

    least_noise: float
    """Noise is taken to be at least this: two engines may happen to agree exactly at the first sync."""
    most_noise: float
    """Mean gap above which the first sync is not noise: the server holds another model."""


PRECISIONS = {
    'float32': Precision(least_noise=2e-4, most_noise=1e-2),  # the upper end is that of TF32
    'float16': Precision(least_noise=1e-3, most_noise=5e-2),
    'bfloat16': Precision(least_noise=5e-3, most_noise=2.5e-1),
}
"""From the finest to the coarsest. Bounds, not estimates: what counts is measured at the first sync."""

GAP_FACTOR = 4.0
"""How many times the noise a gap may be, times 1 + drift: rounding errors grow with the log-probs."""
SURE = 12.0
"""Standard errors that count as certain. Where tokens' noise is not independent, the true error is larger than the one
that is computed here: three times, if a ninth of the tokens say it all, which leaves four."""
FOLLOWED = 0.75
"""Share of the trainer's movement from which a server counts as having followed."""


class WeightSyncError(RuntimeError):
    """The rollout server does not sample from the trainer's weights."""


def coarsest(dtypes: Sequence[str | None]) -> str:
    """The coarsest of these types ('torch.' in front or not); one that is not known counts as bfloat16."""
    order = list(PRECISIONS)
    names = [str(dtype).removeprefix('torch.') for dtype in dtypes]
    return max((name if name in PRECISIONS else order[-1] for name in names), key=order.index)


class ServerProof:
    """Judges one server: two questions at each sync.

    1. *Is the gap noise?* ``mean |server - trainer|`` must be at most ``4 x noise x (1 + drift)``, where noise is the
       gap of the first sync and drift ``mean |trainer - trainer at the first sync|``. Catches a lost tensor, half-old
       weights, nan, another model.
    2. *Did it follow?* ``share = <server's movement, trainer's movement> / |trainer's movement|^2`` over the tokens,
       since the last sync at which this was proven: 1 if the server followed, 0 if it holds the old weights. Its
       standard error is ``sqrt(2) x noise x (1 + drift) / |trainer's movement|`` (noise as root mean square). It is
       proven that the server followed where the share is at least `FOLLOWED` and `SURE` standard errors from 0; it is
       refused where it is below `FOLLOWED` and `SURE` standard errors from 1. While the policy has hardly moved the
       error is large: then nothing is proven, and nothing is refused.

    The second question finds a server that stays behind at about half of the drift that the first one needs, and is
    the only one that proves anything: while the policy has hardly moved, old weights give a small gap too. Rates on
    simulated engines are in tests/unit/test_weight_sync.py.
    """

    def __init__(self, *, in_process: bool = False) -> None:
        """`in_process`: the "server" is the engine in the trainer's process."""
        self._name, self._advice = ('engine', _IN_PROCESS) if in_process else ('server', _WHAT_TO_DO)
        self.proven = False
        """Whether the server has followed a movement that noise can not explain."""
        self.gap = self.drift = self.noise = 0.0
        """Mean absolute differences in nats per token; noise is the first sync's gap."""
        self.share: float | None = None
        """Of the trainer's movement, as far as the server made it; None while the policy has not moved at all."""
        self._limit = self._spread = 0.0
        self._first: list[float] = []
        self._anchor: tuple[list[float], list[float]] = [], []
        """Both sides' log-probs at the last sync that was proven, the first one to begin with."""

    def check(self, trainer: Sequence[float], server: Sequence[float], *, dtype: str, where: str) -> None:
        """Take both sides' log-probs of the same tokens; raise `WeightSyncError` where they tell of different weights.

        Args:
            trainer: log-probs under the trainer's current policy, one per token.
            server: the same tokens' log-probs as the server computes them after the sync.
            dtype: the coarsest type that either side computes in, a key of `PRECISIONS`.
            where: which server and step, for the message.
        """
        if len(trainer) != len(server):
            raise WeightSyncError(f'{where}: {len(server)} log-probs came back for {len(trainer)} tokens.')
        self.gap = _mean_gap(trainer, server)
        if not self._first:
            self._calibrate(trainer, server, dtype, where)
            return
        self.drift = _mean_gap(trainer, self._first)
        limit = self._limit * (1 + self.drift)
        if not self.gap <= limit:
            raise WeightSyncError(
                f"{where}: the {self._name} does not sample from the trainer's weights. Log-probs of a fixed text "
                f'differ by {self.gap:.4g} nats per token. At the first sync, when both sides held the same weights, '
                f'it was {self.noise:.4g}, and {limit:.4g} is allowed now (the policy has moved by {self.drift:.4g} '
                f'since then). {self._advice}'
            )
        self._follow(trainer, server, where)

    def _calibrate(self, trainer: Sequence[float], server: Sequence[float], dtype: str, where: str) -> None:
        precision = PRECISIONS[dtype]
        if not self.gap <= precision.most_noise:
            raise WeightSyncError(
                f'{where}: the {self._name} holds other weights than the trainer already at the first sync. Log-probs '
                f'of a fixed text differ by {self.gap:.4g} nats per token; two engines of the same weights differ by '
                f'at most {precision.most_noise:g} in {dtype}, the coarser of their types. Do both sides name the same '
                f'--model (and adapter)? If so, the first weight sync failed. {self._advice}'
            )
        self.noise = self.gap
        self._limit = GAP_FACTOR * max(self.noise, precision.least_noise)
        squares = sum((s - t) ** 2 for s, t in zip(server, trainer, strict=True))
        # `least_noise` is of the mean; of numbers that are spread like a bell the root mean square is 1.25 times that.
        self._spread = max(math.sqrt(squares / len(trainer)), 1.25 * precision.least_noise)
        self._first = list(trainer)
        self._anchor = list(trainer), list(server)

    def _follow(self, trainer: Sequence[float], server: Sequence[float], where: str) -> None:
        """Compare the movements of both sides since the last proof."""
        trainer_moved = list(map(sub, trainer, self._anchor[0]))
        server_moved = list(map(sub, server, self._anchor[1]))
        length = math.hypot(*trainer_moved)
        if not length:
            return
        self.share = sum(map(mul, server_moved, trainer_moved)) / length**2
        error = math.sqrt(2) * self._spread * (1 + self.drift) / length
        if self.share >= FOLLOWED and SURE * error <= 1:
            self.proven = True
            self._anchor = list(trainer), list(server)
        elif self.share < min(FOLLOWED, 1 - SURE * error):
            raise WeightSyncError(
                f'{where}: the {self._name} has stopped following the trainer. Since the last sync that was proven the '
                f"policy's log-probs of a fixed text have moved by {length / math.sqrt(len(trainer)):.4g} nats per "
                f'token (root mean square), and the {self._name} made {self.share:.0%} of that movement; the noise '
                f'between the two engines is {self._spread:.4g}. {self._advice}'
            )


class WeightSyncProof:
    """One `ServerProof` for each server, and the worst of them for the log."""

    def __init__(self, trainer_dtypes: Sequence[str], *, in_process: bool = False) -> None:
        self._trainer_dtypes = list(trainer_dtypes)
        self._in_process = in_process
        self.servers: dict[str, ServerProof] = {}
        self._began = time.monotonic()
        self._seconds = 0.0

    def is_due(self) -> bool:
        """Whether this sync is compared: always until one is proven, then while it costs little."""
        return not self.proven or self._seconds <= MAX_SHARE * (time.monotonic() - self._began)

    def took(self, seconds: float) -> None:
        """Count the time of a comparison after the proof."""
        self._seconds += seconds

    def check(
        self, trainer: Sequence[float], server: Sequence[float], *, url: str, dtype: str | None, step: int
    ) -> ServerProof:
        """Like `ServerProof.check`, which it gives; `dtype` is the server's, None where it does not tell."""
        judged = self.servers.setdefault(url, ServerProof(in_process=self._in_process))
        judged.check(trainer, server, dtype=coarsest([*self._trainer_dtypes, dtype]), where=f'{url}, step {step}')
        return judged

    @property
    def proven(self) -> bool:
        return bool(self.servers) and all(server.proven for server in self.servers.values())

    @property
    def worst(self) -> ServerProof:
        """The server with the largest gap."""
        return max(self.servers.values(), key=lambda server: server.gap)


_WHAT_TO_DO = (
    "swift's server answers 200 to a weight sync that failed: look for an exception in the rollout server's log, and "
    'restart it before you train on. TREEPO_CHECKS__VERIFY_WEIGHT_SYNC=false turns this check off.'
)

_IN_PROCESS = (
    'swift loads the weights into the engine of this process, and an error would have ended the run: does the engine '
    'have all parameters and adapters of the model that is trained? TREEPO_CHECKS__VERIFY_WEIGHT_SYNC=false turns this '
    'check off.'
)


def _mean_gap(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / max(len(a), 1)
