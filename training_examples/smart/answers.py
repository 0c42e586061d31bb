"""
The values of answers, as integers: what a reasoner of SMART-101 predicts, and how options are compared.

| answers | an option | its value |
| --- | --- | --- |
| `value` | `7`, `3 hours`, `Impossible`, a letter | 7, 3, 0, A = 0 |
| `icon` | `marine animals` | the number of the class in Icons-50 |
| `clock` | `1:00 PM` | the hour, 12 more for PM |
| `operator` | `x6` | + − x / as 1 to 4, times 10, plus the number: 36 |
| `numbers` | `1, 3, or 5`; `5-2-3-1-4` | the numbers |
| `letters` | `A, B and D` | the letters, A = 0 |
| `word` | `KAOL` | its letters, A = 0 |

The last three are sequences.
"""

import re
from collections.abc import Callable


MAX_LENGTH = 10  # of a sequence
SEQUENCES = ("numbers", "letters", "word")
OPERATORS = "+-x/"

# The names in the order of the published list, which has a file among the classes.
ICONS = """airplane arrow_directions ball biking bird blade boat books building bunny_ears cartwheeling clock cloud
disk drinks emotion_face envelope family fast_train feline flag flower footwear golfing hand hat heart holding_hands
japanese_ideograph kiss lock mailbox marine_animals medal money monkey moon mountain numbers phone prohibit_sign
README.txt star surfing tree umbrella vehicle water_polo worker wrestling writing_utensil""".split()


def answer_value(text: str, answers: str) -> list[int]:
    """
    The value of an option or of a reasoner's text: one integer, or those of a sequence.

    Args:
        text (`str`): the option, such as `"3 hours"`; spaces around it and upper or lower case do not matter.
        answers (`str`): how to read it, a row of the table above.

    Raises:
        ValueError: if the text has no such value.
    """
    value = READERS[answers](text.strip())
    if not value or len(value) > MAX_LENGTH:
        raise ValueError(f"{text!r} is no answer of the type '{answers}'; {FORMS[answers]} is accepted")
    return value


def _read_value(text: str) -> list[int]:
    if re.fullmatch("[A-Za-z]", text):
        return _read_word(text)
    if text.lower() == "impossible":
        return [0]
    numbers = re.findall(r"-?\d+", text)
    return [int(number) for number in numbers] if len(numbers) == 1 else []


def _read_icon(text: str) -> list[int]:
    name = "_".join(text.lower().split())
    return [ICONS.index(known) for known in (name, f"{name}s") if known in ICONS][:1]


def _read_clock(text: str) -> list[int]:
    found = re.fullmatch(r"(\d{1,2})(?::00)?\s*(am|pm)?", text, re.IGNORECASE)
    return [int(found[1]) + 12 * ((found[2] or "").lower() == "pm")] if found else []


def _read_operator(text: str) -> list[int]:
    found = re.fullmatch(r"([-+x/])\s*(\d+)", text.lower().replace("−", "-").replace("×", "x").replace("÷", "/"))
    return [10 * (OPERATORS.index(found[1]) + 1) + int(found[2])] if found else []


def _read_numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _read_letters(text: str) -> list[int]:
    return _read_word("".join(re.findall(r"\b[A-Z]\b", text.upper())))


def _read_word(text: str) -> list[int]:
    return [ord(letter) - ord("A") for letter in text.upper()] if re.fullmatch("[A-Za-z]+", text) else []


READERS: dict[str, Callable[[str], list[int]]] = {
    "value": _read_value,
    "icon": _read_icon,
    "clock": _read_clock,
    "operator": _read_operator,
    "numbers": _read_numbers,
    "letters": _read_letters,
    "word": _read_word,
}
FORMS = {
    "value": "one number or one letter",
    "icon": "a class of Icons-50",
    "clock": "a full hour such as 11:00 AM",
    "operator": "one of + - x / with a number",
    "numbers": f"one to {MAX_LENGTH} numbers",
    "letters": f"one to {MAX_LENGTH} letters",
    "word": f"a word of at most {MAX_LENGTH} letters",
}
