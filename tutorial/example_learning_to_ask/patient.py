"""A patient who says little until asked, by rules alone.

Three illnesses look the same at first. Each has one sign that the patient tells when a
question names it; what nobody asks is never told. It knows nothing of rewards.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """What betrays an illness: words that ask for it, and the answers."""

    words: str
    there: str
    absent: str


SIGNS: dict[str, Sign] = {
    "flu": Sign("fever|temperature|hot", "Yes, I have a fever.", "No, I have no fever."),
    "poisoning": Sign("food|eat|ate|meal", "Yes, I ate bad food.", "No, I ate nothing bad."),
    "stress": Sign("sleep|slept|work|tired", "Yes, I work day and night.", "No, I sleep well."),
}
"""The illness -> the sign that only it has."""


@dataclass(frozen=True)
class Patient:
    illness: str

    def reply(self, question: str) -> str | None:
        """The answer to the first sign that is asked for; None where the question names none."""
        for illness, sign in SIGNS.items():
            if re.search(rf"\b({sign.words})", question, re.IGNORECASE):
                return sign.there if illness == self.illness else sign.absent
        return None

    def is_clear_from(self, answers: Collection[str]) -> bool:
        """Whether these answers leave no other illness: its sign, or the absence of all others."""
        others = [sign.absent for illness, sign in SIGNS.items() if illness != self.illness]
        return SIGNS[self.illness].there in answers or all(o in answers for o in others)


def diagnosis(text: str) -> str | None:
    """The one illness that a reply names; None where it names none, or several."""
    named = [illness for illness in SIGNS if illness in text.lower()]
    return named[0] if len(named) == 1 else None
