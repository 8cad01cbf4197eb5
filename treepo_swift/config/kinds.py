"""What the sections of a config are made of: kinds of values, and unions of sections that a name tells apart."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Strict, StringConstraints, Tag

Flag = Annotated[bool, Strict()]
Positive = Annotated[int, Strict(), Field(ge=1)]
NotNegative = Annotated[int, Strict(), Field(ge=0)]
Name = Annotated[str, StringConstraints(min_length=1)]
Favour = Literal['low', 'high']


def _sorted_pair(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, int) for v in value):
        if value[0] > value[1]:
            raise ValueError('a pair [low, high] must have low <= high')
    return value


Count = Annotated[Positive | tuple[Positive, Positive], BeforeValidator(_sorted_pair)]
"""A positive integer, or a pair [low, high] of which one is drawn."""
Temperature = Annotated[float, Strict(), Field(ge=1e-6, le=1e6)]


class Section(BaseModel):
    """A part of the config. Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra='forbid', use_attribute_docstrings=True)


# Which members of a union a reader may count on is known where it looks at the selector. Type checkers can't tell, so
# for them a union of sections is `Any`.
def choice(key: str, default: str, *known: type[Section], custom: type[Section] | None = None) -> Any:
    """A union of sections that their `key` tells apart; a plain string names one, and nothing the `default`.

    Names that are not `known` are `custom`: users register their own, and which are is looked up when policies load.
    """
    names = {name: cls for cls in known for name in get_args(cls.model_fields[key].annotation)}

    def named(value: Any) -> Any:
        if isinstance(value, str):
            return {key: value}
        return {key: default, **value} if isinstance(value, dict) else value

    def tag(value: Any) -> str | None:
        name = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        cls = names.get(name, custom) if isinstance(name, str) else custom
        return None if cls is None else cls.__name__

    members = [Annotated[cls, Tag(cls.__name__)] for cls in (*known, *([custom] if custom else []))]
    wrong = f'{key} must be one of {", ".join(names)}'
    discriminator = Discriminator(tag, custom_error_type='unknown_choice', custom_error_message=wrong)
    return Annotated[Union[tuple(members)], discriminator, BeforeValidator(named)]  # noqa: UP007


def own_name(key: str, *built_in: str) -> Any:
    """The name of something that users registered: any that is not built in."""
    return Field(json_schema_extra={'not': {'enum': list(built_in)}}, description=f'A `{key}` that you registered.')
