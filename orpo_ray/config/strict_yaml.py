"""Read YAML strictly: no duplicate keys, no tags, and limits on depth and size.

`yaml.safe_load` constructs no arbitrary objects, but it keeps the last of two equal keys, accepts any depth, and lets a
kilobyte of aliases expand to gigabytes (https://en.wikipedia.org/wiki/Billion_laughs_attack).
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_DEPTH = 32
"""Maximum nesting of mappings and lists."""
MAX_VALUES = 50_000
"""Maximum number of values; those of an alias count each time it is used."""
MAX_CHARACTERS = 1 << 21
"""Maximum number of characters in all texts together, counted in the same way."""
_MAX_NUMBER = 100
"""Maximum characters of a number: PyYAML reads base-60 numbers, `1:1:1:...`, in time quadratic in their length."""


class NotPlain(ValueError):
    """The text is not YAML or breaks one of the rules here; the message says which and where."""


class _Loader(yaml.SafeLoader):
    """Refuses depth, tags and duplicate keys while reading, when line numbers are still known."""

    depth = 0
    count = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        # The scanner reads all brackets of a line before the first of them is composed.
        if self.flow_level >= MAX_DEPTH:
            raise NotPlain(f"brackets within brackets, more than {MAX_DEPTH} deep, on line {self.line + 1}")
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.count += 1
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise NotPlain(f"tag {event.tag!r:.60} on line {event.start_mark.line + 1}: tags create objects; remove it")
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
            raise NotPlain(f"a number of {len(node.value)} characters, on line {line}; quote it if it is text")
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise NotPlain(f"key {key.value!r:.60} occurs twice in one mapping, on line {line}")
            seen.add(str(key.value))
            if key.tag == "tag:yaml.org,2002:merge" and isinstance(value, yaml.SequenceNode):
                # Repeated merges grow as fast as aliases, before there are values to count.
                raise NotPlain(f"`<<` takes one alias here, not a list, on line {line}")
        return node


def read(text: str) -> Any:
    """The single document of a YAML text, as Python values.

    Raises:
        NotPlain: the text is not YAML or breaks a rule.
    """
    loader = None
    try:
        loader = _Loader(text)
        tree = loader.get_single_data()
    except NotPlain:
        raise
    except yaml.YAMLError as error:
        raise NotPlain(str(error)) from None
    except (ValueError, OverflowError, RecursionError) as error:  # e.g. an impossible date or a huge number
        raise NotPlain(f"a value cannot be read: {error!s:.200}") from None
    finally:
        if loader is not None:
            loader.dispose()
    require_plain(tree)
    return tree


def require_plain(tree: Any) -> None:
    """Check a tree of Python values, from a file or from a caller.

    Raises:
        NotPlain: deeper than `MAX_DEPTH`, more than `MAX_VALUES` values or `MAX_CHARACTERS` characters, an integer of
            more than 64 bits, or text with control characters, which terminals interpret, or unpaired surrogates.
    """
    _count(tree, 0, {})


def _count(value: Any, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Number of values and of characters in `value`. An alias counts at each use but is visited once: `known` holds the
    counts by identity."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise NotPlain("an integer needs more than 64 bits")
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
            raise NotPlain(f"more than {MAX_VALUES} values, with aliases expanded")
        if characters > MAX_CHARACTERS:
            raise NotPlain(f"more than {MAX_CHARACTERS} characters, with aliases expanded")
    known[id(value)] = count, characters
    return count, characters


def _require_printable(text: str) -> None:
    for character in text:
        code = ord(character)
        if (code < 32 and character not in "\t\n\r") or 127 <= code < 160 or 0xD800 <= code < 0xE000:
            raise NotPlain(f"text contains the unprintable character U+{code:04X}: {text!r:.60}")
