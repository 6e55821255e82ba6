"""Everyday English: short stories, descriptions and notes whose facts stay coherent."""

import random

from tiny_corpus import words
from tiny_corpus.schemas import COLUMNS, EXAMPLES, PRETRAIN, UNUSUAL
from tiny_corpus.words import FOODS, PLACES, THINGS, article, plural

JOBS = ("teacher", "nurse", "farmer", "baker", "driver", "doctor", "painter", "gardener", "singer",
        "carpenter", "writer", "pilot", "cook", "engineer")  # fmt: skip
WORKPLACES = {"teacher": "school", "nurse": "hospital", "farmer": "farm", "baker": "bakery",
              "driver": "bus station", "doctor": "hospital", "painter": "studio",
              "gardener": "park", "singer": "theater", "carpenter": "workshop",
              "writer": "small office", "pilot": "airport", "cook": "restaurant",
              "engineer": "factory"}  # fmt: skip
PETS = ("dog", "cat", "bird", "rabbit", "horse")
WEATHER = {"sunny": ("the sky was blue", "went outside without a coat", "warm"),
           "rainy": ("the streets were wet", "took an umbrella", "cool"),
           "windy": ("the leaves flew everywhere", "held on to a hat", "fresh"),
           "snowy": ("the roofs were white", "put on warm boots", "cold"),
           "cloudy": ("the sky was gray", "took a light jacket", "mild")}  # fmt: skip
FEELINGS = ("happy", "tired", "proud", "surprised", "calm", "worried", "curious", "hungry")
_NOUNS = tuple(sorted(EXAMPLES | PRETRAIN))
_ANY = (*_NOUNS, *UNUSUAL, *sorted(COLUMNS))


def _pronouns(name: str) -> tuple[str, str, str]:
    return ("she", "her", "her") if name in words.WOMEN else ("he", "his", "him")


def story(rng: random.Random) -> str:
    """A short day in somebody's life; later sentences repeat the facts of the earlier ones."""
    name, friend = rng.sample(words.FIRST_NAMES, 2)
    he, his, him = _pronouns(name)
    job, place, city = rng.choice(JOBS), rng.choice(PLACES), rng.choice(words.CITIES)
    weather = rng.choice(list(WEATHER))
    sight, action, air = WEATHER[weather]
    thing, color = rng.choice(THINGS), rng.choice(words.COLORS)
    food, other = rng.sample(FOODS, 2)
    feeling, day = rng.choice(FEELINGS), rng.choice(words.DAYS)
    He = he.title()
    parts = [
        rng.choice((
            f"{name} is {article(job)} {job} who lives in {city}.",
            f"{name} lives in {city} and works as {article(job)} {job}.",
            f"In {city} there is {article(job)} {job} named {name}.",
        )),
        rng.choice((
            f"Every morning {he} goes to the {WORKPLACES[job]}.",
            f"{He} works at the {WORKPLACES[job]} and likes it.",
        )),
        rng.choice((
            f"One {weather} {day} {sight}, so {name} {action}.",
            f"On {day} it was {weather} and the air was {air}. {He} {action}.",
        )),
        rng.choice((
            f"{He} walked to the {place} to meet {friend}.",
            f"At the {place} {he} saw {friend}, an old friend.",
            f"{friend} was waiting for {him} at the {place}.",
        )),
        rng.choice((
            f"{friend} had a {color} {thing}. \"Where did you get that {thing}?\" asked {name}.",
            f"{name} gave {friend} a {color} {thing}, and {friend} thanked {him} for the {thing}.",
            f"They found a {color} {thing} near the {place}. The {thing} belonged to {friend}.",
        )),
        rng.choice((
            f"Later they ate {food} and {other} together.",
            f"For lunch they had {food}. {friend} also wanted {other}.",
            f"\"Are you hungry?\" asked {friend}. They bought {food} and some {other}.",
        )),
        rng.choice((
            f"In the evening {name} was {feeling} and went home.",
            f"{name} felt {feeling}. It had been a good {day} in {city}.",
            f"When {he} came home, {he} put {his} coat away and felt {feeling}.",
        )),
    ]  # fmt: skip
    keep = [p for i, p in enumerate(parts) if i in (0, 3) or rng.random() < 0.75]
    return " ".join(keep)


def shopping(rng: random.Random) -> str:
    """A purchase whose sums are right."""
    name = rng.choice(words.FIRST_NAMES)
    he = _pronouns(name)[0].title()
    first, second = rng.sample(THINGS, 2)
    count, price, other = rng.randint(2, 6), rng.randint(2, 9), rng.randint(2, 20)
    total = count * price + other
    return (
        f"{name} went to the {rng.choice(('market', 'shop', 'store'))} and bought {count} "
        f"{plural(first)} for {price} dollars each and a {second} for {other} dollars. "
        f"The {plural(first)} cost {count * price} dollars. {he} paid {total} dollars in all."
    )


def recipe(rng: random.Random) -> str:
    """A short recipe that uses every ingredient it names."""
    a, b, c = rng.sample(FOODS, 3)
    minutes = rng.choice((5, 10, 15, 20, 30, 45))
    dish = rng.choice(("soup", "salad", "pie", "stew", "omelet", "sandwich"))
    return (
        f"How to make {article(a)} {dish} with {a} and {b}. First wash the {a} and cut the {b}. "
        f"Then put the {a} and the {b} in a pan with some {c}. Cook for {minutes} minutes. "
        f"After {minutes} minutes, taste the {dish} and add salt. Serve it "
        f"{rng.choice(('warm', 'hot', 'cold', 'with bread'))}."
    )


def description(rng: random.Random) -> str:
    """A thing of any kind (all nouns of both worlds) described and referred to again."""
    noun, other = rng.sample(_NOUNS, 2)
    color, city, owner = (
        rng.choice(words.COLORS), rng.choice(words.CITIES), rng.choice(words.FIRST_NAMES)
    )  # fmt: skip
    number = rng.randint(2, 90)
    return rng.choice((
        f"There are {number} {plural(noun)} in {city}. {owner} has seen all {number} "
        f"{plural(noun)}, but likes only one {noun}.",
        f"{owner} talked about {article(noun)} {noun} and {article(other)} {other}. The {noun} was "
        f"{color}, and the {other} was in {city}. Many {plural(noun)} are {color}.",
        f"A book about {plural(noun)} and {plural(other)} was published in {city}. The first part "
        f"is about {plural(noun)}, the second part is about {plural(other)}.",
        f"\"Have you ever seen {article(noun)} {noun}?\" asked {owner}. \"Yes, in {city} there are "
        f"many {plural(noun)}. I also saw {article(other)} {other}.\"",
    ))  # fmt: skip


def note(rng: random.Random) -> str:
    """A short list or letter."""
    name, friend = rng.sample(words.FIRST_NAMES, 2)
    items = rng.sample(FOODS, rng.randint(3, 5))
    day, place = rng.choice(words.DAYS), rng.choice(PLACES)
    hour = rng.randint(1, 11)
    return rng.choice((
        "Shopping list:\n" + "\n".join(f"- {i}" for i in items),
        f"Dear {name},\nplease come to the {place} on {day} at {hour} o'clock. Bring {items[0]} "
        f"and {items[1]}.\nSee you on {day},\n{friend}",
        f"To do on {day}:\n1. Buy {items[0]}.\n2. Call {friend}.\n3. Go to the {place}.",
    ))  # fmt: skip


def drill(rng: random.Random) -> str:
    """A vocabulary lesson: words said, said again, counted and sorted, each named repeatedly."""
    some = rng.sample(_ANY, rng.randint(3, 7))
    if rng.random() < 0.3:
        some[rng.randrange(len(some))] = words.invented(rng)
    teacher = rng.choice(words.FIRST_NAMES)
    listed = ", ".join(some)
    noun = rng.choice(_NOUNS)
    return rng.choice((
        f"{teacher} reads the words: {listed}. The class says: {listed}.",
        f"Words of the day: {listed}.\n" + "\n".join(f"{i}. {w}" for i, w in enumerate(some, 1)),
        f"{teacher} wrote {listed}. Then {teacher} wrote them in quotes: "
        + ", ".join(f"'{w}'" for w in some) + ".",
        f"The list is: {listed}. Backwards it is: {', '.join(reversed(some))}.",
        f"The list ({', '.join(some)}) has {len(some)} words. The first is {some[0]} and the last "
        f"is {some[-1]}. After {some[1]} comes {some[2]}.",
        f"One {noun}, two {plural(noun)}. This {noun}, these {plural(noun)}. The word {noun} has "
        f"{len(noun)} letters.",
    ))  # fmt: skip


def document(rng: random.Random) -> str:
    """One English document of any kind."""
    kinds = (story, shopping, recipe, description, note, drill)
    return rng.choices(kinds, (4, 1, 1, 3, 1, 6))[0](rng)
