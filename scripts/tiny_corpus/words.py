"""Word lists shared by the generators: names, places and values that recur across kinds of text."""

import random

FIRST_NAMES = tuple(
    "Anna Ben Carla David Emma Felix Grace Henry Ida Jack Karen Leo Maria Nina Oscar Paula "
    "Quinn Rosa Sam Tina Victor Wendy Alice Bruno Clara Daniel Elena Frank Hanna Ivan Julia "
    "Kevin Laura Marco Nora Oliver Peter Rita Simon Tom Vera Walter Lucy Martin Helen Omar "
    "Priya Yuki Amir Lena Diego Sofia Hugo Mila Noah Olga Paul Ruth Stella Theo".split()
)
WOMEN = frozenset(
    "Anna Carla Emma Grace Ida Karen Maria Nina Paula Rosa Tina Wendy Alice Clara Elena Hanna "
    "Julia Laura Nora Rita Vera Lucy Helen Priya Yuki Lena Sofia Mila Olga Ruth Stella".split()
)
FAMILY_NAMES = ("Adams", "Baker", "Chen", "Diaz", "Evans", "Fischer", "Garcia", "Hill", "Ito",
                "Jones", "Khan", "Lopez", "Moore", "Novak", "O'Brien", "Park", "Rossi", "Silva",
                "Turner", "Walsh")  # fmt: skip
CITIES = tuple(
    "Rome Paris London Madrid Berlin Vienna Oslo Dublin Athens Lisbon Tokyo Cairo Boston "
    "Chicago Lima Prague Warsaw Geneva Milan Seoul Sydney Toronto Dallas Denver".split()
)
COUNTRIES = tuple(
    "France Spain Italy Germany Japan China India Brazil Canada Mexico Norway Sweden Poland "
    "Greece Egypt Kenya Peru Chile Ireland Turkey".split()
)
CAPITALS = (
    ("France", "Paris"), ("Spain", "Madrid"), ("Italy", "Rome"), ("Germany", "Berlin"),
    ("Austria", "Vienna"), ("Norway", "Oslo"), ("Ireland", "Dublin"), ("Greece", "Athens"),
    ("Portugal", "Lisbon"), ("Japan", "Tokyo"), ("Egypt", "Cairo"), ("Peru", "Lima"),
    ("Poland", "Warsaw"), ("England", "London"),
)  # fmt: skip
COLORS = ("red", "blue", "green", "yellow", "black", "white", "brown", "gray", "orange", "pink",
          "purple", "silver")  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December")  # fmt: skip
SEASONS = ("spring", "summer", "autumn", "winter")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
           "eleven", "twelve")  # fmt: skip
PROPER = tuple(
    "Aurora Falcon Comet Orion Nova Delta Atlas Titan Phoenix Willow Cedar Maple Harbor Summit "
    "Meadow Canyon Breeze Ember Coral Pearl Ruby Amber Jade Opal Zephyr Echo Lotus Raven Sparrow "
    "Tiger Lion Eagle Bear Wolf Star Moon Sun River Storm Crystal Velvet Copper Granite Marble "
    "Cobalt Saffron Olive Juniper Laurel Ivy".split()
)

_ONSETS = "b br c d dr f fl g gr k l m n p pl r s st t tr v z".split()
_VOWELS = "a e i o u".split()
_CODAS = ("", "", "l", "m", "n", "r", "s", "t", "x")


def invented(rng: random.Random, syllables: int = 2) -> str:
    """A pronounceable word nobody has seen, so that only copying can reproduce it."""
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)
    ) + rng.choice(_CODAS)


def plural(noun: str) -> str:
    """The regular English plural of a noun."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun + "s"


def article(word: str) -> str:
    """`a` or `an`, by the first letter."""
    return "an" if word[0].lower() in "aeiou" else "a"
