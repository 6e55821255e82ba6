"""Questions and answers about ordinary knowledge, as plain text and as conversations."""

import random
from collections.abc import Callable

from tiny_corpus import words
from tiny_corpus.schemas import EXAMPLES, PRETRAIN
from tiny_corpus.words import NUMBERS, article, plural

Turn = tuple[str, str]
"""A user's words and the reply."""

OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "young"), ("high", "low"),
    ("long", "short"), ("light", "dark"), ("happy", "sad"), ("open", "closed"), ("early", "late"),
    ("wet", "dry"), ("hard", "soft"), ("full", "empty"), ("near", "far"), ("loud", "quiet"),
    ("strong", "weak"), ("rich", "poor"), ("clean", "dirty"), ("first", "last"), ("up", "down"),
    ("cheap", "expensive"), ("above", "below"), ("more", "less"), ("day", "night"),
)  # fmt: skip
COLORS_OF = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sky": "blue",
             "a banana": "yellow", "a carrot": "orange", "milk": "white", "a tomato": "red",
             "a lemon": "yellow", "chocolate": "brown", "a leaf": "green", "the night": "black",
             "an elephant": "gray", "a strawberry": "red"}  # fmt: skip
DEFINITIONS = {
    "baker": "a person who makes bread", "library": "a place where people read and borrow books",
    "hospital": "a place where doctors and nurses help sick people",
    "umbrella": "a thing that keeps you dry in the rain", "clock": "a thing that shows the time",
    "teacher": "a person who helps others learn", "farmer": "a person who grows food",
    "kettle": "a pot for boiling water", "map": "a drawing that shows where places are",
    "museum": "a place where old or beautiful things are shown",
    "pilot": "a person who flies planes", "bridge": "a road that crosses a river",
    "winter": "the coldest season of the year", "summer": "the warmest season of the year",
    "island": "land with water all around it", "mountain": "a very high piece of land",
    "bicycle": "a vehicle with two wheels", "lamp": "a thing that gives light",
    "doctor": "a person who helps sick people", "bakery": "a shop that sells bread and cakes",
    "chef": "a person who cooks in a restaurant", "singer": "a person who sings songs",
    "average": "the sum of some numbers divided by how many there are",
    "maximum": "the largest of some numbers", "minimum": "the smallest of some numbers",
}  # fmt: skip
SOUNDS = {"dog": "barks", "cat": "meows", "cow": "moos", "duck": "quacks", "lion": "roars",
          "sheep": "bleats", "horse": "neighs", "bird": "sings"}  # fmt: skip
CATEGORIES = {
    "a fruit": ("apple", "banana", "pear", "cherry", "plum"),
    "an animal": ("dog", "horse", "tiger", "goat", "rabbit"),
    "a color": ("red", "blue", "green", "purple"), "a vehicle": ("car", "train", "boat", "bus"),
    "a tool": ("hammer", "saw", "drill"), "a piece of clothing": ("coat", "hat", "shirt", "scarf"),
    "a piece of furniture": ("chair", "bed", "sofa"),
    "a musical instrument": ("piano", "guitar", "violin"),
}  # fmt: skip
NOUNS = tuple(sorted(PRETRAIN | EXAMPLES))
SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"), ("Hi there.", "Hi! What can I do for you?"),
    ("Good morning!", "Good morning! How can I help you today?"),
    ("Thank you!", "You are welcome!"), ("Thanks a lot.", "You are welcome!"),
    ("Goodbye!", "Goodbye! Have a nice day."), ("How are you?", "I am fine, thank you."),
    ("Can you help me?", "Of course. What do you need?"),
    ("What can you do?", "I can answer short questions about everyday things."),
)  # fmt: skip


def _opposite(rng: random.Random) -> Turn:
    a, b = rng.choice(OPPOSITES)
    if rng.random() < 0.5:
        a, b = b, a
    ask = rng.choice(("What is the opposite of {a}?", "Tell me the opposite of {a}.",
                      "Which word means the opposite of {a}?"))  # fmt: skip
    return ask.format(a=a), f"The opposite of {a} is {b}."


def _color(rng: random.Random) -> Turn:
    thing = rng.choice(list(COLORS_OF))
    ask = rng.choice(("What color is {t}?", "Which color does {t} have?"))
    return ask.format(t=thing), f"{thing[0].upper()}{thing[1:]} is {COLORS_OF[thing]}."


def _definition(rng: random.Random) -> Turn:
    word = rng.choice(list(DEFINITIONS))
    named = word if word in ("winter", "summer") else f"{article(word)} {word}"
    ask = rng.choice(("What is {w}?", "Explain what {w} is.", "Can you tell me what {w} is?"))
    return ask.format(w=named), f"{named[0].upper()}{named[1:]} is {DEFINITIONS[word]}."


def _arithmetic(rng: random.Random) -> Turn:
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    if rng.random() < 0.4:
        a, b = max(a, b), min(a, b)
        ask = rng.choice(("What is {a} minus {b}?", "Subtract {b} from {a}."))
        return ask.format(a=a, b=b), f"{a} minus {b} is {a - b}."
    ask = rng.choice(("What is {a} plus {b}?", "Add {a} and {b}.", "How much is {a} plus {b}?"))
    return ask.format(a=a, b=b), f"{a} plus {b} is {a + b}."


def _compare(rng: random.Random) -> Turn:
    a, b = rng.sample(range(1, 100), 2)
    if rng.random() < 0.5:
        return f"Which number is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}."
    return f"Which number is smaller, {a} or {b}?", f"{min(a, b)} is smaller than {max(a, b)}."


def _next(rng: random.Random) -> Turn:
    kind, cycle = rng.choice((("day", words.DAYS), ("month", words.MONTHS)))
    place = rng.randrange(len(cycle))
    if rng.random() < 0.5:
        return f"Which {kind} comes after {cycle[place]}?", (
            f"{cycle[(place + 1) % len(cycle)]} comes after {cycle[place]}."
        )
    return f"Which {kind} comes before {cycle[place]}?", (f"{cycle[place - 1]} comes before {cycle[place]}.")


def _capital(rng: random.Random) -> Turn:
    country, city = rng.choice(words.CAPITALS)
    if rng.random() < 0.6:
        return f"What is the capital of {country}?", f"The capital of {country} is {city}."
    return f"In which country is {city}?", f"{city} is in {country}."


def _sound(rng: random.Random) -> Turn:
    animal = rng.choice(list(SOUNDS))
    return f"What sound does a {animal} make?", f"A {animal} {SOUNDS[animal]}."


def _category(rng: random.Random) -> Turn:
    category = rng.choice(list(CATEGORIES))
    member = rng.choice(CATEGORIES[category])
    named = f"{article(member)} {member}" if category != "a color" else member
    if rng.random() < 0.5:
        return f"What kind of thing is {named}?", f"{named.capitalize()} is {category}."
    return f"Give me an example of {category}.", f"An example of {category} is {named}."


def _plural(rng: random.Random) -> Turn:
    noun = rng.choice(("cat", "box", "city", "lamp", "baby", "dish", "bus", "car", "story", "key"))
    return f"What is the plural of {noun}?", f"The plural of {noun} is {plural(noun)}."


def _number_word(rng: random.Random) -> Turn:
    n = rng.randrange(len(NUMBERS))
    if rng.random() < 0.5:
        return f"Write the number {n} as a word.", f"The number {n} is written {NUMBERS[n]}."
    return f"Which number is {NUMBERS[n]}?", f"{NUMBERS[n].capitalize()} is the number {n}."


def _word(rng: random.Random) -> str:
    pools = (words.PROPER, words.CITIES, words.FIRST_NAMES, words.COLORS, NOUNS, NOUNS)
    if rng.random() < 0.35:
        made_up = words.invented(rng, rng.choice((2, 2, 3)))
        return made_up.title() if rng.random() < 0.4 else made_up
    return rng.choice(rng.choice(pools))


def _repeat(rng: random.Random) -> Turn:
    """Copying on request: the ability on which every later task leans."""
    said = [_word(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
    if rng.random() < 0.3:
        said.append(str(rng.randint(1, 9999)))
    ask, reply = rng.choice((
        ("Repeat after me: {w}", "{w}"), ("Say {w}.", "{w}"),
        ("Write {w} in quotes.", "'{w}'"), ("Put {w} between quotes.", "'{w}'"),
        ("Write {w} in brackets.", "({w})"), ("Put {w} between brackets.", "({w})"),
    ))  # fmt: skip
    text = " ".join(said)
    return ask.format(w=text), reply.format(w=text)


def _pick(rng: random.Random) -> Turn:
    """Finding one of several facts given in the question."""
    names = rng.sample(words.FIRST_NAMES, 3)
    attribute, pool = rng.choice((("favorite color", words.COLORS), ("city", words.CITIES),
                                  ("birth month", words.MONTHS)))  # fmt: skip
    values = rng.sample(pool, 3)
    told = " ".join(f"The {attribute} of {n} is {v}." for n, v in zip(names, values, strict=True))
    which = rng.randrange(3)
    if rng.random() < 0.6:
        return f"{told} What is the {attribute} of {names[which]}?", (
            f"The {attribute} of {names[which]} is {values[which]}."
        )
    return f"{told} Whose {attribute} is {values[which]}?", (
        f"{values[which]} is the {attribute} of {names[which]}."
    )


TOPICS: tuple[tuple[Callable[[random.Random], Turn], float], ...] = (
    (_opposite, 1), (_color, 1), (_definition, 1.5), (_arithmetic, 1.5), (_compare, 0.7),
    (_next, 1), (_capital, 1), (_sound, 0.5), (_category, 1), (_plural, 0.5), (_number_word, 0.5),
    (_repeat, 4), (_pick, 2),
)  # fmt: skip


def turn(rng: random.Random) -> Turn:
    """One question about everyday knowledge, and its answer."""
    makers, weights = zip(*TOPICS, strict=True)
    return rng.choices(makers, weights)[0](rng)


def turns(rng: random.Random, count: int) -> list[Turn]:
    """A conversation: perhaps a greeting first and thanks last, questions between."""
    talk = [turn(rng) for _ in range(count)]
    if rng.random() < 0.15:
        talk.insert(0, SMALL_TALK[rng.randrange(3)])
    if rng.random() < 0.1:
        talk.append(SMALL_TALK[rng.randrange(3, 6)])
    return talk


def chatml(talk: list[Turn]) -> str:
    """The conversation as the chat template renders it."""
    return "".join(
        f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n{reply}<|im_end|>\n"
        for said, reply in talk
    )


def document(rng: random.Random) -> str:
    """A conversation in the chat template, or questions and answers as plain text."""
    if rng.random() < 0.8:
        system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        return (system if rng.random() < 0.1 else "") + chatml(turns(rng, rng.randint(1, 4)))
    return "\n".join(f"Q: {said}\nA: {reply}" for said, reply in turns(rng, rng.randint(1, 4)))
