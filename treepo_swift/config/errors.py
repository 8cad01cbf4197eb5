"""`ConfigError`, and what it says of a value that pydantic refused: where it is, what it is, what is allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

SELECTORS = ('policy', 'detector', 'rule', 'estimator')
"""Keys that choose what else a section holds."""

MOVED = {
    'branch_score': 'branching.score',
    'branch_favour': 'branching.favour',
    'branch_temperature': 'branching.temperature',
    'branch_schedule': 'branching.schedule',
    'entropy_top_k': 'branching.top_k',
    'budget_tokens': 'budget.tokens',
    'fallback_candidates': 'fallback.candidates',
    'fallback_window': 'fallback.window',
    'fallback_block': 'fallback.block',
    'fallback_favour': 'fallback.favour',
    'fallback_fill': 'fallback.fill',
    'answer': 'stop.answer.detector',
    'answer_tags': 'stop.answer.tags',
    'answer_needs_eos': 'stop.answer.needs_eos',
    'after_answer': 'stop.answer.after',
    'stop_at_repetition': 'stop.repetition.rule (loop, windows or none)',
    'repetition_length': 'stop.repetition.length, with rule: windows',
    'repetition_count': 'stop.repetition.count, with rule: windows',
    'stop_order': 'stop.order',
    'estimator': 'advantage.estimator',
    'weighting': 'advantage.weighting',
    'reject_flat_subgroups': 'advantage.reject_flat_subgroups',
    'include_root': 'advantage.include_root',
    'count_chains': 'advantage.count_chains',
    'normalisation': 'advantage.normalisation',
    'whiten_shift_mean': 'advantage.normalisation: whiten_scale (where it was false)',
    'max_retries': 'faults.max_retries',
    'max_failure_fraction': 'faults.max_failure_fraction',
    'hook_timeout': 'faults.hook_timeout',
    'require_trainer': 'checks.require_trainer',
    'verify_weight_sync': 'checks.verify_weight_sync',
}
"""Flat keys of earlier versions, and what says the same now."""
GONE = {
    'schedule': 'both grew the same tree, and no engine was faster with lockstep',
    'tree_order': 'it had no effect on the tail of a batch',
    'fallback_start': 'early fallback had no effect on the tail of a batch',
}
"""Flat keys of earlier versions that were dropped, and why."""


Keys = tuple[str, ...]
"""Where a value stands: the names of its sections, and its own."""


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type, or impossible together with another."""

    def __init__(self, message: str, problems: Mapping[Keys, str] | None = None) -> None:
        """`problems` has a sentence for each value that is wrong, where those are known one by one."""
        super().__init__(message)
        self.problems = dict(problems or {})


def explained(error: ValidationError, model: type[BaseModel], values: Mapping[str, Any]) -> ConfigError:
    """The same error in words for users, one sentence for each value that is wrong."""
    problems: dict[Keys, str] = {}
    for details in error.errors(include_url=False):
        keys = tuple(_keys(details['loc'], values, missing=details['type'] == 'missing'))
        sentence = _sentence(details, keys, model)
        begun = problems.get(keys, '').removesuffix('.')
        # A value that may be of several kinds has an error for each.
        problems[keys] = f'{begun} or {sentence.partition(": must be ")[2]}' if ': must be ' in begun else sentence
    return ConfigError(' '.join(problems.values()), problems)


def _sentence(details: Any, keys: Keys, model: type[BaseModel]) -> str:
    name, message = '.'.join(keys), details['msg'].removeprefix('Value error, ')
    if details['type'] == 'extra_forbidden':
        return _unknown(keys, model)
    if details['type'] == 'missing':
        return f'{name} is missing.'
    if not keys:
        return message if message.endswith('.') else f'{message}.'
    message = message.replace('Input should be', 'must be').replace('a valid tuple', 'a pair')
    return f'{name}={details["input"]!r}: {message}.'


def _keys(location: tuple[Any, ...], values: Any, *, missing: bool) -> Iterator[str]:
    """The keys of a location as users wrote them, without pydantic's names for members of unions."""
    for index, part in enumerate(location):
        if isinstance(values, Mapping) and part in values:
            yield str(part)
            values = values[part]
        elif isinstance(values, (list, tuple)) and isinstance(part, int):
            return  # the error is about the whole list
        elif index == len(location) - 1 and (missing or isinstance(values, Mapping)):
            yield str(part)


def _unknown(keys: Keys, model: type[BaseModel]) -> str:
    *sections, key = keys
    if not sections and key in MOVED:
        return f'{key!r} is {MOVED[key]} now (keys are in sections).'
    if not sections and key in GONE:
        return f'{key!r} does not exist any more: {GONE[key]}. Leave it out.'
    members = [model]
    for section in sections:
        members = [inner for cls in members if section in cls.model_fields for inner in models_of(cls, section)]
    having = [cls for cls in members if key in cls.model_fields]
    name = '.'.join(keys)
    if having and len(members) > 1:
        owners = ' or '.join(choice for cls in having for choice in _choices(cls))
        return f'{name} has no effect here: it belongs to {owners}.'
    allowed = dict.fromkeys(field for cls in members for field in cls.model_fields)
    return f'unknown key {name!r}. Allowed are: {", ".join(allowed)}.'


def models_of(cls: type[BaseModel], key: str) -> list[type[BaseModel]]:
    """The sections that can stand under `key`."""
    found: list[type[BaseModel]] = []
    unread: list[Any] = [cls.model_fields[key].annotation]
    while unread:
        annotation = unread.pop(0)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        unread += get_args(annotation)
    return found


def _choices(cls: type[BaseModel]) -> list[str]:
    """`policy: logprob` and the like: what chooses this section."""
    for key in SELECTORS:
        if key in cls.model_fields:
            names = [name for name in get_args(cls.model_fields[key].annotation) if isinstance(name, str)]
            return [f'{key}: {name}' for name in names] or [f'a {key} of your own']
    return [cls.__name__]
