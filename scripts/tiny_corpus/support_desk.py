"""The support desk of Lumo, a maker of lamps that does not exist: facts, and talk about them."""

import random
from dataclasses import dataclass

from tiny_corpus.dialogue import Turn


@dataclass(frozen=True)
class Lamp:
    """A product and the facts that every reply about it must agree on."""

    name: str
    room: str
    price: int
    bulb: str
    watts: int
    guarantee: int
    height: int
    colors: tuple[str, str]
    cable: int


LAMPS = (
    Lamp("Lumo One", "desk", 29, "E14", 6, 2, 38, ("white", "black"), 150),
    Lamp("Lumo Tall", "living room", 79, "E27", 12, 3, 165, ("silver", "brown"), 220),
    Lamp("Lumo Mini", "bedside table", 19, "G9", 3, 2, 22, ("pink", "white"), 120),
    Lamp("Lumo Sky", "ceiling", 99, "E27", 18, 5, 30, ("white", "gray"), 100),
    Lamp("Lumo Reader", "armchair", 49, "E14", 7, 3, 120, ("green", "black"), 180),
    Lamp("Lumo Garden", "garden", 59, "GU10", 9, 4, 60, ("black", "silver"), 500),
    Lamp("Lumo Kids", "nursery", 25, "G9", 4, 3, 28, ("yellow", "blue"), 130),
    Lamp("Lumo Studio", "workbench", 89, "E27", 15, 5, 75, ("red", "gray"), 200),
)

_ABOUT_A_LAMP: tuple[tuple[tuple[str, ...], str], ...] = (
    (("How much is the {n}?", "What does the {n} cost?", "What is the price of the {n}?"),
     "The {n} costs {price} dollars."),
    (("Which bulb does the {n} need?", "What bulb fits the {n}?", "I need a bulb for my {n}."),
     "The {n} takes {a_bulb} bulb with {watts} watts."),
    (("How long is the guarantee of the {n}?", "What guarantee does the {n} have?"),
     "The {n} has a guarantee of {guarantee} years."),
    (("How tall is the {n}?", "What is the height of the {n}?"),
     "The {n} is {height} centimeters tall."),
    (("Which colors does the {n} come in?", "What colors are there for the {n}?"),
     "The {n} comes in {c0} and {c1}."),
    (("How long is the cable of the {n}?", "What cable length does the {n} have?"),
     "The cable of the {n} is {cable} centimeters long."),
    (("Where can I use the {n}?", "What is the {n} made for?"),
     "The {n} is made for the {room}."),
    (("My {n} does not turn on.", "The {n} stays dark. What can I do?"),
     "I am sorry to hear that. Please check the plug and put in a new {bulb} bulb. If the {n} "
     "stays dark, we will replace it."),
    (("The light of my {n} flickers.", "Why does my {n} flicker?"),
     "A flicker mostly means a loose bulb. Please turn the {n} off and tighten the {bulb} bulb."),
    (("Can I use a stronger bulb in the {n}?", "Is a bulb of 40 watts fine for the {n}?"),
     "Please do not. The {n} is made for {watts} watts at most."),
    (("How do I clean the {n}?", "What is the best way to clean my {n}?"),
     "Please unplug the {n} and use a dry, soft cloth."),
)  # fmt: skip
_GENERAL: tuple[tuple[tuple[str, ...], str], ...] = (
    (("How can I return a lamp?", "I want to send my lamp back.", "Can I return my order?"),
     "You can return any lamp within 30 days. Please write to returns@lumo.example."),
    (("How long does delivery take?", "When will my order arrive?"),
     "Delivery takes 3 to 5 working days."),
    (("What does delivery cost?", "Is delivery free?"),
     "Delivery costs 4 dollars. From 50 dollars on it is free."),
    (("When is the support desk open?", "What are your opening hours?"),
     "We are here from Monday to Friday, 9 to 17 o'clock."),
    (("Do you sell bulbs?", "Can I buy a new bulb from you?"),
     "Yes. A spare bulb costs 5 dollars for any lamp."),
    (("Where are the lamps made?", "In which country do you make your lamps?"),
     "All Lumo lamps are made in Portugal."),
    (("Do you ship to other countries?", "Can you deliver to Norway?"),
     "Yes, we ship to all countries of Europe for 12 dollars."),
    (("How can I pay?", "Which ways to pay do you accept?"),
     "You can pay by card, by bank transfer or with a gift card."),
    (("I lost my receipt. Is the guarantee still valid?", "Do I need the receipt?"),
     "You do not need the receipt. Your order number is enough."),
    (("My lamp arrived broken.", "The lamp was damaged in the box."),
     "I am very sorry. Please send us a photo and we will send a new lamp at once."),
)  # fmt: skip
_OPENINGS = ("", "", "Hello! ", "Hi, ", "Good morning. ", "Excuse me, ", "Quick question: ")


def slots(lamp: Lamp) -> dict[str, object]:
    """The facts of a lamp under the names that the sentences use."""
    article = "a" if lamp.bulb.startswith("G") else "an"
    return {"n": lamp.name, "room": lamp.room, "price": lamp.price, "bulb": lamp.bulb,
            "watts": lamp.watts, "guarantee": lamp.guarantee, "height": lamp.height,
            "c0": lamp.colors[0], "c1": lamp.colors[1], "cable": lamp.cable,
            "a_bulb": f"{article} {lamp.bulb}"}  # fmt: skip


def _opened(opening: str, ask: str) -> str:
    if opening.endswith((", ", ": ")) and not ask.startswith("I "):
        return opening + ask[0].lower() + ask[1:]
    return opening + ask


def talk(rng: random.Random) -> list[Turn]:
    """Every question with its reply, in random order, some with a greeting before them."""
    made = [
        (ask.format(**slots(lamp)), reply.format(**slots(lamp)))
        for lamp in LAMPS
        for asks, reply in _ABOUT_A_LAMP
        for ask in asks
    ]
    general = [(ask, reply) for asks, reply in _GENERAL for ask in asks]
    made += general + [(_opened(o, a), r) for a, r in general for o in _OPENINGS[2:]]
    rng.shuffle(made)
    return [(ask if ask[:5] in {o[:5] for o in _OPENINGS if o}
             else _opened(rng.choice(_OPENINGS), ask), reply) for ask, reply in made]  # fmt: skip
