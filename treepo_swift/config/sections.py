"""The sections of `TreeConfig`: a class of settings for each choice, so that a knob exists only where it has effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, Strict

from .kinds import Favour, Flag, Name, NotNegative, Positive, Section, Temperature, choice, own_name

REASONS = (
    'answer',
    'eos',
    'stop_string',
    'hook',
    'repetition',
    'token_limit',
    'context_limit',
    'depth_limit',
)
"""Names of the stop reasons that a path of its own can have (`core.tree.StopReason` without the placeholders)."""

# Branching.


class EvenBranching(Section):
    """The same number of branches for every path; what is left over is drawn."""

    policy: Literal['even']


class _WeightedBranching(Section):
    favour: Favour = 'low'
    """Whether the less (`low`) or the more probable paths get more branches."""
    temperature: Temperature | tuple[Temperature, Temperature] = 2.0
    """Softmax temperature over the scores. A pair `[start, end]` moves over training (the paper: `[5, 1]`)."""
    schedule: Literal['linear', 'cosine', 'sinusoid'] = 'linear'
    """How a pair of temperatures moves from start to end."""


class LogprobBranching(_WeightedBranching):
    """By the log-probs of each path."""

    policy: Literal['logprob']
    score: Literal['sum', 'mean', 'last_segment'] = 'last_segment'
    """The sum or the mean of a path's log-probs, or the mean over its last segment."""


class EntropyBranching(_WeightedBranching):
    """By the mean entropy of each path's last segment; high entropy is low certainty."""

    policy: Literal['entropy']
    top_k: Positive = 20
    """Log-probs per token from which the entropy is estimated."""


class CustomBranching(Section):
    """A policy that you registered (`register_branching`)."""

    policy: Name = own_name('policy', 'even', 'logprob', 'entropy')
    options: dict[str, Any] = {}
    """What your policy reads as `context.config.branching.options`."""


if TYPE_CHECKING:
    Branching: TypeAlias = Any
else:
    Branching = choice('policy', 'even', EvenBranching, LogprobBranching, EntropyBranching, custom=CustomBranching)

# Where forks start.


class BoundaryPosition(Section):
    """At the end of the segment (the paper's)."""

    policy: Literal['boundary']


class LogprobPosition(Section):
    """Before the segment's least probable token, which is sampled anew."""

    policy: Literal['min_logprob_token']


class EntropyPosition(Section):
    """Before the token of the segment at which the model was least certain (`max_entropy_token`); or at the prompt, as
    long as there are fewer first branches than the first token has choices, and then at boundaries
    (`first_token_entropy`)."""

    policy: Literal['max_entropy_token', 'first_token_entropy']
    top_k: Positive = 20
    """Log-probs per token from which the entropy is estimated."""


class CustomPosition(Section):
    """A policy that you registered (`register_fork_position`)."""

    policy: Name = own_name('policy', 'boundary', 'min_logprob_token', 'max_entropy_token', 'first_token_entropy')
    options: dict[str, Any] = {}
    """What your policy reads as `context.config.fork_position.options`."""
    top_k: NotNegative = 0
    """Log-probs per token from which the entropies are estimated that your policy reads; 0: it reads none."""


if TYPE_CHECKING:
    ForkPosition: TypeAlias = Any
else:
    ForkPosition = choice(
        'policy', 'boundary', BoundaryPosition, LogprobPosition, EntropyPosition, custom=CustomPosition
    )

# Budgets.


class WidthBudget(Section):
    """Nothing bounds the forks but the width."""

    policy: Literal['by_width']


class SegmentTokensBudget(Section):
    """`tokens` for each depth of a server's batch, shared evenly by the prompts that still grow; they wait for each
    other at each depth."""

    policy: Literal['by_segment_tokens']
    tokens: Positive
    """Tokens of a depth of the batch."""


class TrajectoryTokensBudget(Section):
    """`tokens` for each prompt, the sum of its trajectories' lengths: paths that use it up stop, and what does not fit
    becomes masked placeholders."""

    policy: Literal['by_trajectory_tokens']
    tokens: Positive
    """Tokens of a prompt's trajectories."""


if TYPE_CHECKING:
    Budget: TypeAlias = Any
else:
    Budget = choice('policy', 'by_width', WidthBudget, SegmentTokensBudget, TrajectoryTokensBudget)

# Fallback.


class _CuttingFallback(Section):
    candidates: Literal['answer_or_eos', 'finished', 'best_reason_first', 'lowest_reward_first', 'any'] = (
        'answer_or_eos'
    )
    """Paths that may be cut: those that ended with an answer or EOS; that ended by themselves in any way; all, best
    stop reason first; all, lowest reward first, where an environment says `total_reward` in time; or all in random
    order. Without a candidate the root branches."""
    window: NotNegative = 0
    """Cut at most so many segments before a path's end; 0: anywhere."""
    cuts: Positive = 1
    """Cuts of each such path before what grew from them has ended; each gives up to d branches."""


class SegmentFallback(_CuttingFallback):
    """Cut at a segment boundary: each as likely as the others (`random_segment`, the paper's), or before the segment of
    the lowest mean log-prob (`min_logprob_segment`). With `fork_at: turn` segments here are turns."""

    policy: Literal['random_segment', 'min_logprob_segment']


class TokenFallback(_CuttingFallback):
    """Cut anywhere (`random_token`), or before the least probable token (`min_logprob_token`)."""

    policy: Literal['random_token', 'min_logprob_token']


class EntropyFallback(_CuttingFallback):
    """Cut before the token at which the model was least certain."""

    policy: Literal['max_entropy_token']
    top_k: Positive = 20
    """Log-probs per token from which the entropy is estimated."""


class BlockFallback(_CuttingFallback):
    """Cut at a multiple of `block` tokens (the paper's "misaligned" ablation)."""

    policy: Literal['random_block']
    block: Positive = 128
    """Tokens of a block."""


class LogprobBlockFallback(_CuttingFallback):
    """Cut at the beginning of a block, drawn by the blocks' mean log-probs."""

    policy: Literal['logprob_block']
    block: Positive = 128
    """Tokens of a block."""
    favour: Favour = 'low'
    """Whether blocks of low or of high mean log-prob are preferred."""


class RootFallback(Section):
    """Branch from the root."""

    policy: Literal['root']


class NoFallback(Section):
    """Leave the tree as it is."""

    policy: Literal['none']
    fill: Literal['placeholder', 'root'] = 'placeholder'
    """What fills the tree: masked placeholders, or fresh branches from the root."""


class CustomFallback(_CuttingFallback):
    """A cut policy that you registered (`register_fallback`)."""

    policy: Name = own_name(
        'policy',
        'random_segment',
        'min_logprob_segment',
        'random_token',
        'min_logprob_token',
        'max_entropy_token',
        'random_block',
        'logprob_block',
        'root',
        'none',
    )
    options: dict[str, Any] = {}
    """What your policy reads as `context.config.fallback.options`."""


if TYPE_CHECKING:
    Fallback: TypeAlias = Any
else:
    Fallback = choice(
        'policy',
        'random_segment',
        SegmentFallback,
        TokenFallback,
        EntropyFallback,
        BlockFallback,
        LogprobBlockFallback,
        RootFallback,
        NoFallback,
        custom=CustomFallback,
    )

# Stopping.


class _Answer(Section):
    needs_eos: Flag = True
    """A path with an answer goes on to EOS, and ends as answered. `false` stops it at the end of the segment that holds
    the answer, often in mid-sentence, and trains on it as if it had ended."""
    after: Literal['keep', 'cut'] = 'keep'
    """Whether a path that stopped at an answer keeps the rest of that segment, or is cut after the token that completes
    the answer."""


class BoxedAnswer(_Answer):
    """A complete, non-empty `\\boxed{...}`."""

    detector: Literal['boxed']


class TaggedAnswer(_Answer):
    """Text between an opening and a closing tag."""

    detector: Literal['tags']
    tags: tuple[Name, Name] = ('<answer>', '</answer>')
    """Opening and closing tag."""


class NoAnswer(Section):
    """No text stops a path for its answer."""

    detector: Literal['none']


class CustomAnswer(_Answer):
    """A detector that you registered (`register_answer`)."""

    detector: Name = own_name('detector', 'boxed', 'tags', 'none')


if TYPE_CHECKING:
    Answer: TypeAlias = Any
else:
    Answer = choice('detector', 'boxed', BoxedAnswer, TaggedAnswer, NoAnswer, custom=CustomAnswer)


class LoopRepetition(Section):
    """The end of the text is one unit over and over: a loop that would go on."""

    rule: Literal['loop']
    repeats: Annotated[int, Strict(), Field(ge=3)] = 8
    """Fewest repeats of the unit."""
    characters: Positive = 500
    """Fewest characters of all repeats together."""
    near_characters: NotNegative = 0
    """Also stop at so many characters in a row that hold nothing new but digits ("Step 17: ... Step 18: ..."). 0 does
    not look for them: long honest enumerations look the same. See docs/policies.md for figures."""


class WindowRepetition(Section):
    """The official code's rule: some substring occurs often, anywhere in the turn. It stops many healthy texts."""

    rule: Literal['windows']
    length: Annotated[int, Strict(), Field(ge=2)] = 32
    """Characters of the shortest substring that counts."""
    count: Annotated[int, Strict(), Field(ge=2)] = 8
    """Occurrences (overlaps included) at which a path counts as repeating."""


class NoRepetition(Section):
    """No path stops for repeating itself."""

    rule: Literal['none']


if TYPE_CHECKING:
    Repetition: TypeAlias = Any
else:
    Repetition = choice('rule', 'loop', LoopRepetition, WindowRepetition, NoRepetition)


def _different(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(value)) != len(value):
        raise ValueError('names a reason twice')
    return value


class Stop(Section):
    """When the text of a path says that it should stop."""

    answer: Answer = BoxedAnswer(detector='boxed')
    """The early stop: what counts as an answer."""
    repetition: Repetition = LoopRepetition(rule='loop')
    """What counts as a repetition."""
    order: Annotated[tuple[Literal[REASONS], ...], AfterValidator(_different)] = ()  # type: ignore[valid-type]
    """Stop reasons that win, in this order, where several hold at once. Those not named follow as answer, eos,
    stop_string, hook, repetition, token_limit, context_limit, depth_limit."""


# Advantages.


class _Advantage(Section):
    normalisation: Literal['whiten', 'whiten_scale', 'group', 'none'] = 'whiten'
    """Advantages over the whole batch by loss tokens (`whiten`; `whiten_scale` does not subtract the mean), divided by
    each tree's own standard deviation (`group`), or as they are."""


class TreepoAdvantage(_Advantage):
    """TreePO: a trajectory against every subgroup that it belongs to."""

    estimator: Literal['treepo']
    weighting: Literal['average', 'size'] = 'average'
    """How subgroups combine: `average` (Eq. 5) or weighted by their `size` (Eq. 6)."""
    reject_flat_subgroups: Flag = False
    """Leave out subgroups below the root whose rewards are all alike (Eq. 7)."""
    include_root: Flag = True
    """Compare with the whole tree too. `false` does so only where no deeper subgroup exists."""
    count_chains: Literal['per_depth', 'per_fork'] = 'per_depth'
    """A chain that does not fork counts once per segment (`per_depth`, the official code) or once (`per_fork`)."""


class OtherAdvantage(_Advantage):
    """Another estimator of the package (`grpo`, `rloo`, `reinforce_plus_plus`, `tree_grpo`, `progress`, `spo`,
    `spo_tree`, `treerl`, `at2po`, `rtmc`, `fr3e`, `depth_wise`), or one that you registered (`register_advantage`)."""

    estimator: Name = own_name('estimator', 'treepo')
    options: dict[str, Any] = {}
    """Keyword arguments of an estimator that you registered, or of `rtmc` (`prior`)."""


if TYPE_CHECKING:
    Advantage: TypeAlias = Any
else:
    Advantage = choice('estimator', 'treepo', TreepoAdvantage, custom=OtherAdvantage)

# Training.


class SharedPrefix(Section):
    """What trajectories share is computed once in training too, where the result is the same (docs/training.md)."""

    enabled: Flag = True
    """Compute log-probs over the trie of a micro-batch's rows. A run checks itself once against the plain path, and
    computes row by row where a model or a batch asks for it."""
    skip_old_logprobs: Flag = True
    """Leave out the pass for old log-probs where the policy that trains is the one that sampled, so that swift's loss
    is the same without."""
    max_tokens: Positive | None = None
    """Micro-batches of one optimizer step go through the model together while their trie has at most so many tokens.
    Not given: as many as need no more memory than one micro-batch row by row."""


class Trace(Section):
    """Trees on disk: `--log_completions true` of `swift rlhf` writes them, `treepo-swift view` shows them."""

    rate: Annotated[float, Strict(), Field(ge=0, le=1)] = 1.0
    """Share of the trees that are written, for large runs. Which of them follows from their ids."""


# What goes wrong, and what is checked.


class Faults(Section):
    """How much may go wrong."""

    max_retries: NotNegative = 2
    """How often a segment is asked of the engine again after an engine error."""
    max_failure_fraction: Annotated[float, Strict(), Field(ge=0, le=1)] = 0.5
    """Share of failed trajectories in a batch above which the rollout raises."""
    hook_timeout: Annotated[float, Strict(), Field(ge=0.001, allow_inf_nan=False)] = 60.0
    """Seconds that an overridden hook may take, from when it runs, before its path counts as failed."""
    max_hung_hooks: NotNegative = 64
    """Threads that hooks may hold for good before the rollout raises; each that never returns is replaced."""
    stall_timeout: Annotated[float, Strict(), Field(ge=0.1, allow_inf_nan=False)] = 600.0
    """Seconds without an output of the engine for anybody. Then every request that waits is made again, at most
    `max_retries` times in a row. In colocate mode, where the answers of hooks count too, the rollout ends with an error
    that says where it stands."""
    reward_timeout: Annotated[float, Strict(), Field(ge=0.001, allow_inf_nan=False)] | None = 21600.0
    """Seconds that a reward function may take for a batch before the training ends, by its name, on all ranks. The
    default, six hours, is there for what never returns: a slow judge that works is not stopped. null waits for good."""


class Checks(Section):
    """What is refused, and proven, at the cost of a little time."""

    require_trainer: Flag = True
    """The server refuses requests that were not sent by TreeGRPOTrainer, so that nobody trains on trees with flat
    advantages unknowingly."""
    verify_weight_sync: Flag = True
    """Compare log-probs of a fixed text between trainer and server after every weight sync, and stop the run where the
    server does not follow."""
