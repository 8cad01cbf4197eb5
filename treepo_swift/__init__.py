"""Tree rollouts for GRPO training with ms-swift (TreePO, arXiv 2508.17445): the public names.

Importing this package loads none of its modules, and no torch, vllm or swift: each name is loaded when it is first
used. Only the schedulers and `register` need ms-swift, and `shared_logprobs` torch; the rest is plain Python and numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treepo_swift.advantage import estimate, estimate_segments, normalise, register_advantage, whiten
    from treepo_swift.config import ConfigError, TreeConfig
    from treepo_swift.core.policies.answers import register_answer
    from treepo_swift.core.policies.branching import register_branching
    from treepo_swift.core.policies.fallback import register_fallback
    from treepo_swift.core.policies.fork_position import register_fork_position
    from treepo_swift.core.policies.stopping import check_text
    from treepo_swift.core.tree import Node, Path, StopReason, Tree
    from treepo_swift.plugin import register
    from treepo_swift.server.gym import TreeGymScheduler
    from treepo_swift.server.scheduler import TreeRolloutScheduler
    from treepo_swift.trainer.shared_prefix.logprobs import shared_logprobs

__version__ = '0.2.0'
__all__ = [
    'ConfigError',
    'Node',
    'Path',
    'StopReason',
    'Tree',
    'TreeConfig',
    'TreeGymScheduler',
    'TreeRolloutScheduler',
    'check_text',
    'estimate',
    'estimate_segments',
    'normalise',
    'register',
    'register_advantage',
    'register_answer',
    'register_branching',
    'register_fallback',
    'register_fork_position',
    'shared_logprobs',
    'whiten',
]

# What the imports above say to type checkers and editors; a test holds the two and `__all__` together.
_MODULES = {
    'advantage': ('estimate', 'estimate_segments', 'normalise', 'register_advantage', 'whiten'),
    'config': ('ConfigError', 'TreeConfig'),
    'core.policies.answers': ('register_answer',),
    'core.policies.branching': ('register_branching',),
    'core.policies.fallback': ('register_fallback',),
    'core.policies.fork_position': ('register_fork_position',),
    'core.policies.stopping': ('check_text',),
    'core.tree': ('Node', 'Path', 'StopReason', 'Tree'),
    'plugin': ('register',),
    'server.gym': ('TreeGymScheduler',),
    'server.scheduler': ('TreeRolloutScheduler',),
    'trainer.shared_prefix.logprobs': ('shared_logprobs',),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}; public are {", ".join(__all__)}.')
    value = getattr(import_module(f'{__name__}.{_MODULE_OF[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
