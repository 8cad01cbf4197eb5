"""`TreeConfig` from the flat keys of earlier versions: short in tests, and what `golden.json` was written with."""

from __future__ import annotations

from typing import Any

from treepo_swift.config import TreeConfig
from treepo_swift.config.sources import merged

PLACES = {
    'branching': ('branching', 'policy'),
    'branch_score': ('branching', 'score'),
    'branch_favour': ('branching', 'favour'),
    'branch_temperature': ('branching', 'temperature'),
    'branch_schedule': ('branching', 'schedule'),
    'entropy_top_k': ('branching', 'top_k'),
    'budget': ('budget', 'policy'),
    'budget_tokens': ('budget', 'tokens'),
    'fallback': ('fallback', 'policy'),
    'fallback_candidates': ('fallback', 'candidates'),
    'fallback_window': ('fallback', 'window'),
    'fallback_cuts': ('fallback', 'cuts'),
    'fallback_block': ('fallback', 'block'),
    'fallback_favour': ('fallback', 'favour'),
    'fallback_fill': ('fallback', 'fill'),
    'answer': ('stop', 'answer', 'detector'),
    'answer_needs_eos': ('stop', 'answer', 'needs_eos'),
    'answer_tags': ('stop', 'answer', 'tags'),
    'after_answer': ('stop', 'answer', 'after'),
    'repetition_length': ('stop', 'repetition', 'length'),
    'repetition_count': ('stop', 'repetition', 'count'),
    'stop_order': ('stop', 'order'),
    'estimator': ('advantage', 'estimator'),
    'normalisation': ('advantage', 'normalisation'),
    'weighting': ('advantage', 'weighting'),
    'reject_flat_subgroups': ('advantage', 'reject_flat_subgroups'),
    'include_root': ('advantage', 'include_root'),
    'count_chains': ('advantage', 'count_chains'),
    'max_retries': ('faults', 'max_retries'),
    'max_failure_fraction': ('faults', 'max_failure_fraction'),
    'hook_timeout': ('faults', 'hook_timeout'),
    'stall_timeout': ('faults', 'stall_timeout'),
    'require_trainer': ('checks', 'require_trainer'),
    'verify_weight_sync': ('checks', 'verify_weight_sync'),
}
READ_BY = {
    ('branching', 'score'): ('logprob',),
    ('branching', 'favour'): ('logprob', 'entropy'),
    ('branching', 'temperature'): ('logprob', 'entropy'),
    ('branching', 'schedule'): ('logprob', 'entropy'),
    ('branching', 'top_k'): ('entropy',),
    ('budget', 'tokens'): ('by_segment_tokens', 'by_trajectory_tokens'),
    ('fallback', 'block'): ('random_block', 'logprob_block'),
    ('fallback', 'favour'): ('logprob_block',),
    ('fallback', 'fill'): ('none',),
}
"""Keys that only some choices of their section have; others never read them, and no key is allowed to do nothing."""


def flat(**keys: Any) -> TreeConfig:
    """Keys at their old places go where they are now; those that the chosen policy never read are left out."""
    return TreeConfig(**_nested({'stop_at_repetition': True, 'answer_needs_eos': False, **keys}))


def changed(config: TreeConfig, **keys: Any) -> TreeConfig:
    """The same config but for some flat keys."""
    note = config.to_note()
    if keys.get('answer') == 'none':
        note.get('stop', {}).pop('answer', None)
    return TreeConfig(**merged(note, _nested(keys)))


def _nested(keys: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in keys.items():
        *sections, name = PLACES.get(key, (key,))
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value
    repeats = values.pop('stop_at_repetition', None)
    if repeats is False:
        values.setdefault('stop', {})['repetition'] = {'rule': 'none'}
    elif repeats or 'repetition' in values.get('stop', {}):
        values.setdefault('stop', {}).setdefault('repetition', {})['rule'] = 'windows'
    for (section, name), readers in READ_BY.items():
        chosen = values.get(section, {}).get('policy', DEFAULTS[section])
        if chosen in KNOWN and chosen not in readers:
            values.get(section, {}).pop(name, None)
    if values.get('fallback', {}).get('policy') in ('root', 'none'):
        for name in ('candidates', 'window', 'cuts'):
            values['fallback'].pop(name, None)
    answer = values.get('stop', {}).get('answer', {})
    if answer.get('detector') != 'tags':
        answer.pop('tags', None)
    if answer.get('detector') == 'none':
        values['stop']['answer'] = 'none'
    return values


DEFAULTS = {'branching': 'even', 'budget': 'by_width', 'fallback': 'random_segment'}
KNOWN = {reader for readers in READ_BY.values() for reader in readers} | {
    *DEFAULTS.values(),
    'root',
    'random_token',
    'min_logprob_segment',
    'min_logprob_token',
    'max_entropy_token',
}
