"""Toy-English stories with a checker, so that "the model speaks" becomes a number.

A story is six sentences about somebody who finds something somewhere. Who, what, what kind and
where are named in the first and must stay the same to the last; pronouns follow the name and
the article follows the adjective. `check_story` parses a text and tests just that.
"""

from __future__ import annotations

import math
import re

_TIMES = ("One morning", "One evening", "On Monday", "Last summer")
_PRONOUNS = {
    **dict.fromkeys(("Anna", "Emma", "Lucy", "Mary", "Rosa"), ("she", "her")),
    **dict.fromkeys(("Ben", "Jack", "Oscar", "Sam", "Tom"), ("he", "his")),
}
_ARTICLES = {"big": "a", "old": "an", "red": "a", "tiny": "a", "orange": "an", "shiny": "a"}
_OBJECTS = ("ball", "book", "box", "coin", "drum", "hat", "kite", "lamp")
_PLACES = ("attic", "barn", "forest", "garden", "kitchen", "park")
_SENTENCES = (
    ("{time} {name} found {article} {adjective} {object} in the {place}.",),
    (
        "{Pronoun} picked up the {object} and smiled.",
        "{Pronoun} had never seen such {article} {adjective} {object} before.",
    ),
    (
        '"Whose {object} is this?" asked {name}.',
        "{name} showed the {object} to {possessive} mother.",
    ),
    (
        "Then {pronoun} played with the {object} in the {place} all day.",
        "Nobody in the {place} knew, so {pronoun} kept the {object}.",
    ),
    ("{Possessive} brother came to the {place} and asked for the {adjective} {object}.",),
    (
        "At night {name} took the {object} home.",
        "When {pronoun} left the {place}, {name} gave {possessive} brother the {object}.",
    ),
)
_CHOICES = (_TIMES, tuple(_PRONOUNS), tuple(_ARTICLES), _OBJECTS, _PLACES, *_SENTENCES)

NUM_STORIES = math.prod(len(choices) for choices in _CHOICES)
"""Number of different stories."""


def story(number: int) -> str:
    """Return one story.

    Args:
        number: 0 <= number < `NUM_STORIES`; different numbers give different stories.

    Returns:
        Six sentences on one line, with a newline at the end.
    """
    if not 0 <= number < NUM_STORIES:
        raise IndexError(f"story {number} does not exist: there are {NUM_STORIES:,}")
    digits = []
    for choices in _CHOICES:
        number, digit = divmod(number, len(choices))
        digits.append(choices[digit])
    time, name, adjective, thing, place, *sentences = digits
    pronoun, possessive = _PRONOUNS[name]
    words = {
        "time": time,
        "name": name,
        "article": _ARTICLES[adjective],
        "adjective": adjective,
        "object": thing,
        "place": place,
        "pronoun": pronoun,
        "Pronoun": pronoun.capitalize(),
        "possessive": possessive,
        "Possessive": possessive.capitalize(),
    }
    return " ".join(sentence.format(**words) for sentence in sentences) + "\n"


def check_story(text: str) -> bool:
    """Tell whether a text is a grammatical story that keeps to its facts.

    Args:
        text: what a model wrote, up to the end of the document; outer blanks do not matter.

    Returns:
        True where all six sentences are there and well formed, name, object, adjective and place
        stay the same throughout, every pronoun fits the name and the article the adjective.
    """
    facts: dict[str, str] = {}
    rest = text.strip()
    for number, pattern in enumerate(_PATTERNS):
        match = pattern.match(rest)
        if match is None:
            return False
        for group, word in match.groupdict().items():
            if word is None:
                continue
            field, word = _fact(group, word)
            if facts.setdefault(field, word) != word:
                return False
        rest = rest[match.end() :]
        if number + 1 < len(_PATTERNS):
            if not rest.startswith(" "):
                return False
            rest = rest[1:]
    return not rest and _agree(facts)


def _agree(facts: dict[str, str]) -> bool:
    known = (
        facts["time"] in _TIMES
        and facts["name"] in _PRONOUNS
        and facts["adjective"] in _ARTICLES
        and facts["object"] in _OBJECTS
        and facts["place"] in _PLACES
    )
    if not known or facts["article"] != _ARTICLES[facts["adjective"]]:
        return False
    pronoun, possessive = _PRONOUNS[facts["name"]]
    return facts.get("pronoun", pronoun) == pronoun and facts["possessive"] == possessive


def _fact(group: str, word: str) -> tuple[str, str]:
    """Return field and word of a group; a capital field (at a sentence's start) in small letters.

    A pronoun without its capital at the start of a sentence becomes a word that no fact equals.
    """
    field = group.split("_")[0]
    if field[0].isupper():
        return field.lower(), word.lower() if word[0].isupper() else f"uncapitalised {word}"
    return field, word


def _pattern(number: int, variants: tuple[str, ...]) -> re.Pattern[str]:
    """Compile the variants of a sentence; groups are named field_sentence_variant_place."""
    alternatives = []
    for v, variant in enumerate(variants):
        pieces = re.split(r"\{(\w+)\}", variant)
        parts = []
        for place, piece in enumerate(pieces):
            if place % 2 == 0:
                parts.append(re.escape(piece))
                continue
            words = "[A-Za-z]+ [A-Za-z]+" if piece == "time" else "[A-Za-z]+"
            parts.append(f"(?P<{piece}_{number}_{v}_{place}>{words})")
        alternatives.append("".join(parts))
    return re.compile("|".join(f"(?:{alternative})" for alternative in alternatives))


_PATTERNS = tuple(_pattern(number, variants) for number, variants in enumerate(_SENTENCES))
