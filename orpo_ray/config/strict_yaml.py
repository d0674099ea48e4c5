"""YAML that means one thing and has an end: what an experiment file or an override may hold.

`yaml.safe_load` makes no foreign objects, but it takes the last of two equal keys, follows any depth, and its aliases
let a kilobyte stand for gigabytes (https://en.wikipedia.org/wiki/Billion_laughs_attack).
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_DEPTH = 32
"""Mappings and lists within each other."""
MAX_VALUES = 50_000
"""Values, those of aliases counted as often as they are used."""
MAX_CHARACTERS = 1 << 21
"""Characters of all texts together, counted in the same way."""
_MAX_NUMBER = 100
"""Characters of a number: PyYAML reads `1:1:1:...`, of base 60, in a time that grows with the square of its length."""


class NotPlain(ValueError):
    """The text is not YAML, or it breaks one of the rules here; the message says which, and where."""


class _Loader(yaml.SafeLoader):
    """Refuses depth, tags and equal keys while it reads, where the line is still known."""

    depth = 0
    count = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        # The scanner looks ahead over all brackets of a line before one of them is composed.
        if self.flow_level >= MAX_DEPTH:
            raise NotPlain(f"brackets within brackets, more than {MAX_DEPTH} deep, on line {self.line + 1}")
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.count += 1
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise NotPlain(f"tag {event.tag!r:.60} on line {event.start_mark.line + 1}: tags make objects, take it out")
        if self.depth > MAX_DEPTH or self.count > MAX_VALUES:
            law = f"more than {MAX_DEPTH} levels deep" if self.depth > MAX_DEPTH else f"more than {MAX_VALUES} values"
            raise NotPlain(f"{law}, on line {event.start_mark.line + 1}")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) > _MAX_NUMBER:
            line = node.start_mark.line + 1
            raise NotPlain(f"a number of {len(node.value)} characters, on line {line}; if it is text, quote it")
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise NotPlain(f"key {key.value!r:.60} stands twice in one mapping, on line {line}")
            seen.add(str(key.value))
            if key.tag == "tag:yaml.org,2002:merge" and isinstance(value, yaml.SequenceNode):
                # Mappings merged many times over grow as fast as aliases do, before there is a value to count.
                raise NotPlain(f"`<<` takes one alias here, not a list, on line {line}")
        return node


def read(text: str) -> Any:
    """The one document of a YAML text, as Python's own values.

    Raises:
        NotPlain: see there.
    """
    loader = None
    try:
        loader = _Loader(text)
        tree = loader.get_single_data()
    except NotPlain:
        raise
    except yaml.YAMLError as error:
        raise NotPlain(str(error)) from None
    except (ValueError, OverflowError, RecursionError) as error:  # no such date, or a number of thousands of digits
        raise NotPlain(f"a value cannot be read: {error!s:.200}") from None
    finally:
        if loader is not None:
            loader.dispose()
    require_plain(tree)
    return tree


def require_plain(tree: Any) -> None:
    """Check what was read, or given as Python values.

    Raises:
        NotPlain: deeper than `MAX_DEPTH`, more than `MAX_VALUES` values or `MAX_CHARACTERS` characters, an integer of
            more than 64 bits, or text with control characters (terminals obey them) or with half a character.
    """
    _count(tree, 0, {})


def _count(value: Any, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Values and characters in `value`, each alias counted again though looked into once; `known` by identity."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise NotPlain("a whole number needs more than 64 bits")
    if not isinstance(value, str | dict | list | tuple):
        return 1, 0
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, str):
        _require_printable(value)
        return known.setdefault(id(value), (1, len(value)))
    if depth > MAX_DEPTH:
        raise NotPlain(f"more than {MAX_DEPTH} levels deep; does an alias contain itself?")
    items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    count, characters = 1, 0
    for item in items:
        more, longer = _count(item, depth + 1, known)
        count, characters = count + more, characters + longer
        if count > MAX_VALUES:
            raise NotPlain(f"more than {MAX_VALUES} values, aliases written out")
        if characters > MAX_CHARACTERS:
            raise NotPlain(f"more than {MAX_CHARACTERS} characters, aliases written out")
    known[id(value)] = count, characters
    return count, characters


def _require_printable(text: str) -> None:
    for character in text:
        code = ord(character)
        if (code < 32 and character not in "\t\n\r") or 127 <= code < 160 or 0xD800 <= code < 0xE000:
            raise NotPlain(f"text holds the character U+{code:04X}, which is not to be printed: {text!r:.60}")
