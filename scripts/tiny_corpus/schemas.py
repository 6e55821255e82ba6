"""Tables with columns and rows: the worlds that the SQL texts and the SQL examples talk about.

Pre-training and the example data use different table nouns (`PRETRAIN` and `EXAMPLES`, disjoint by
a check below), so that answering about an example's table always means reading its schema.
"""

import random
from dataclasses import dataclass

from tiny_corpus import words


@dataclass(frozen=True)
class Column:
    """A column, the values it may take, and how people speak about it."""

    name: str
    values: tuple[str, ...] = ()
    """The words a text column draws from; empty for a number."""
    low: int = 0
    high: int = 0
    step: int = 1
    more: str = ""
    """How to say `> k`, if there is a special word (`older than`)."""
    less: str = ""
    most: str = ""
    """How to say the largest, if there is a special word (`oldest`)."""
    least: str = ""
    equals: str = ""
    """How to say `= v` in a text column, if there is a special way (`from {v}`)."""

    @property
    def is_text(self) -> bool:
        return bool(self.values)


@dataclass(frozen=True)
class Table:
    """A table with its rows; the first column names the thing and never repeats a value."""

    name: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str | int, ...], ...]

    @property
    def plural(self) -> str:
        return words.plural(self.name)

    def values(self, column: Column) -> tuple[str | int, ...]:
        index = self.columns.index(column)
        return tuple(row[index] for row in self.rows)

    @property
    def create(self) -> str:
        inside = ", ".join(f"{c.name} {'TEXT' if c.is_text else 'INTEGER'}" for c in self.columns)
        return f"CREATE TABLE {self.name} ({inside});"

    @property
    def insert(self) -> str:
        rows = ", ".join("(" + ", ".join(map(literal, row)) + ")" for row in self.rows)
        return f"INSERT INTO {self.name} VALUES {rows};"


def literal(value: str | int) -> str:
    """A value as SQL writes it: text in quotes, an inner quote doubled."""
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"


def _text(name: str, values: str | tuple[str, ...], equals: str = "") -> Column:
    return Column(name, tuple(values.split()) if isinstance(values, str) else values, equals=equals)


def _number(
    name: str,
    low: int,
    high: int,
    step: int = 1,
    speech: tuple[str, str, str, str] = ("", "", "", ""),
) -> Column:
    more, less, most, least = speech
    return Column(name, (), low, high, step, more, less, most, least)


_COLUMNS = (
    _text("city", words.CITIES, "in {v}"),
    _text("country", words.COUNTRIES, "from {v}"),
    _text("color", words.COLORS, "colored {v}"),
    _text("owner", words.FIRST_NAMES[:40], "owned by {v}"),
    _text("month", words.MONTHS, "in {v}"),
    _text("day", words.DAYS, "on {v}"),
    _text("season", words.SEASONS),
    _text("region", "north south east west center coast"),
    _text("material", "wood steel glass stone plastic leather paper cotton", "made of {v}"),
    _text("size", "tiny small medium large huge"),
    _text("status", "open closed new old ready broken"),
    _text("brand", ("Aurora", "Falcon", "Comet", "Nova", "Delta", "Atlas", "Titan", "Lotus")),
    _text("language", "English French Spanish German Italian Arabic Hindi Greek"),
    _text("team", "Lions Tigers Bears Eagles Wolves Sharks Hawks Bulls"),
    _text("style", "modern classic simple folk baroque rustic formal"),
    _text("genre", "drama comedy jazz rock mystery romance fantasy history"),
    _text("shape", "round square oval flat long"),
    _text("taste", "sweet sour salty bitter spicy mild"),
    _text("grade", "gold silver bronze basic premium"),
    _text("department", "sales finance design support research planning"),
    _text("level", "beginner medium advanced expert"),
    _text("habitat", "forest desert ocean river mountain meadow"),
    _text("food", "grass fish fruit seeds meat insects"),
    _text("author", words.FIRST_NAMES[20:], "by {v}"),
    _text("fuel", "petrol diesel electric gas steam"),
    _text("hobby", "chess tennis music painting fishing cooking running"),
    _number("age", 18, 80, 1, ("older than", "younger than", "oldest", "youngest")),
    _number("price", 5, 900, 5, ("more expensive than", "cheaper than", "most expensive", "cheapest")),
    _number("year", 1950, 2024, 1, ("from after", "from before", "newest", "")),
    _number("weight", 2, 400, 1, ("heavier than", "lighter than", "heaviest", "lightest")),
    _number("height", 10, 300, 1, ("taller than", "shorter than", "tallest", "shortest")),
    _number("length", 5, 500, 1, ("longer than", "shorter than", "longest", "")),
    _number("rating", 1, 10),
    _number("score", 10, 100),
    _number("stock", 1, 200),
    _number("capacity", 10, 5000, 10),
    _number("distance", 1, 900),
    _number("speed", 10, 300, 5, ("faster than", "slower than", "fastest", "slowest")),
    _number("salary", 1000, 9000, 100),
    _number("cost", 10, 2000, 10),
    _number("budget", 500, 9500, 100),
    _number("population", 100, 9000, 50),
    _number("duration", 5, 240, 5),
    _number("pages", 20, 900),
    _number("wins", 1, 60),
    _number("seats", 2, 500),
    _number("rooms", 2, 90),
    _number("visitors", 50, 5000, 10),
    _number("depth", 1, 300, 1, ("deeper than", "", "deepest", "")),
    _number("area", 10, 4000, 10),
    _number("power", 20, 800, 10),
    _number("calories", 20, 900, 10),
    _number("points", 1, 99),
    _number("years", 1, 40),
)
_EXAMPLE_COLUMNS = (
    _text("nation", words.COUNTRIES),
    _text("sponsor", "Brightco Lumina Everfield Northway Solano Tavira Quantia"),
    _text("award", "gold silver bronze none"),
    _text("architect", ("Ito", "Rossi", "O'Brien", "Novak", "Silva", "Khan"), "designed by {v}"),
    _text("flavor", "vanilla lemon mint cherry ginger honey"),
    _text("mood", "calm happy sad angry bright"),
    _number("altitude", 50, 4000, 50),
    _number("tickets", 20, 900, 10),
    _number("staff", 2, 90),
    _number("volume", 5, 300, 5),
    _number("revenue", 500, 9000, 100),
    _number("lifespan", 2, 80),
    _number("followers", 100, 9900, 100),
    _number("mileage", 500, 9500, 100),
)
COLUMNS = {c.name: c for c in (*_COLUMNS, *_EXAMPLE_COLUMNS)}
KEYS = {
    "name": words.FIRST_NAMES,
    "label": words.PROPER,
    "title": words.PROPER,
    "model": words.PROPER,
}


@dataclass(frozen=True)
class Theme:
    """Nouns that can share columns, each noun on one side of the pre-training / example border."""

    key: str
    pretrain: tuple[str, ...]
    examples: tuple[str, ...]
    columns: tuple[str, ...]
    example_columns: tuple[str, ...]


def _theme(key: str, pretrain: str, examples: str, columns: str, example_columns: str) -> Theme:
    return Theme(
        key,
        tuple(pretrain.split()),
        tuple(examples.split()),
        tuple(columns.split()),
        tuple(example_columns.split()),
    )


THEMES = (
    _theme(
        "name",
        "teacher student doctor farmer nurse driver player worker customer member manager employee "
        "soldier sailor writer friend neighbor clerk guest baker user parent owner person seller "
        "buyer leader helper trainer guard",
        "singer pilot dancer chef actor lawyer plumber painter poet barber jockey sculptor "
        "violinist referee goalkeeper swimmer boxer runner cyclist skater drummer guitarist "
        "pianist carpenter tailor butcher florist gardener librarian architect engineer scientist "
        "surgeon dentist judge senator mayor wrestler gymnast magician astronaut sailmaker "
        "detective journalist translator banker broker waiter",
        "age city country height weight salary team hobby language level score wins points years "
        "department rating region",
        "nation award sponsor followers",
    ),
    _theme(
        "label",
        "town hotel school shop park river lake office garden station street house village market "
        "bank hospital library farm road island mountain room bridge building store church",
        "museum stadium castle airport theater temple bakery harbor vineyard tower palace zoo "
        "arena gallery cinema factory warehouse college academy clinic pharmacy resort hostel "
        "campsite aquarium lighthouse cathedral monastery fortress cottage tavern diner bistro "
        "nightclub gym spa laboratory observatory mine quarry dam canal waterfall volcano glacier "
        "cave beach forest valley canyon",
        "city country region area rooms visitors capacity rating year status budget height owner "
        "population cost depth",
        "architect altitude tickets staff revenue",
    ),
    _theme(
        "model",
        "car boat train truck plane bike wagon ship van motor",
        "ferry tram yacht scooter helicopter tractor submarine rocket canoe kayak glider taxi "
        "limousine ambulance snowmobile trolley sled raft minibus tanker freighter motorcycle "
        "drone balloon satellite",
        "color brand year speed price weight length seats power fuel owner country status capacity",
        "mileage sponsor",
    ),
    _theme(
        "label",
        "lamp chair book phone cup plate desk bag coat shirt hat shoe clock toy box bottle "
        "knife pen door mirror bed computer radio tool",
        "guitar camera sofa carpet curtain blanket pillow necklace bracelet watch jacket sweater "
        "scarf glove helmet backpack suitcase umbrella violin trumpet piano drum flute tent "
        "hammer drill saw printer tablet laptop monitor keyboard speaker headphone vase candle "
        "basket kettle toaster blender oven freezer stove heater fan telescope microscope",
        "color brand price weight material size stock shape style height rating year grade country",
        "volume award sponsor",
    ),
    _theme(
        "name",
        "dog cat horse cow sheep bird hen goat duck pig rabbit lion tiger bear",
        "parrot turtle penguin dolphin elephant giraffe zebra monkey panda kangaroo koala otter "
        "beaver squirrel hamster lizard frog crocodile eagle falcon owl swan flamingo peacock "
        "camel llama donkey whale shark octopus",
        "age weight color height length habitat food country speed owner region size",
        "lifespan mood nation",
    ),
    _theme(
        "label",
        "cake soup pizza bread pie meal drink salad fruit cookie egg tea dinner snack",
        "muffin cocktail sandwich burger pancake waffle omelet sausage curry stew noodle dumpling "
        "taco burrito pudding sorbet smoothie juice wine beer coffee cheese yogurt jam chocolate "
        "candy lollipop pretzel bagel croissant",
        "price taste size calories weight country rating stock season owner cost grade color",
        "flavor volume",
    ),
    _theme(
        "title",
        "song film story play letter report picture lesson game course",
        "opera painting poem podcast novel magazine newspaper album sculpture documentary musical "
        "symphony ballad cartoon comic blog essay lecture diary biography dictionary atlas "
        "textbook puzzle",
        "author genre year language pages duration price rating style country level cost",
        "mood award revenue followers",
    ),
    _theme(
        "title",
        "meeting party trip class race visit show dance",
        "concert festival marathon tournament workshop conference exhibition parade auction "
        "wedding picnic seminar ceremony regatta carnival rally contest banquet expedition cruise "
        "safari webinar",
        "city month day season year cost duration visitors capacity rating budget country status",
        "tickets sponsor staff revenue",
    ),
)
PRETRAIN = frozenset(noun for theme in THEMES for noun in theme.pretrain)
EXAMPLES = frozenset(noun for theme in THEMES for noun in theme.examples)
UNUSUAL = tuple(
    sorted(
        {w.lower() for w in (*words.THINGS, *words.FOODS, *words.PLACES, *words.PROPER)}
        | {v for c in COLUMNS.values() for v in c.values if v.isalpha() and v.islower()}
        | {w.lower() for w in (*words.CITIES, *words.COUNTRIES, *words.FIRST_NAMES)}
    )
)
"""Words that make odd tables, so that a table name is copied rather than guessed."""
UNUSUAL = tuple(w for w in UNUSUAL if w not in EXAMPLES)
if PRETRAIN & EXAMPLES:
    raise AssertionError(f"nouns on both sides: {sorted(PRETRAIN & EXAMPLES)}")


def _rows(
    rng: random.Random, key_values: tuple[str, ...], columns: tuple[Column, ...], count: int
) -> tuple[tuple[str | int, ...], ...]:
    """Rows with unique keys, distinct numbers (no ties in an ordering) and repeated words."""
    drawn: list[list[str | int]] = [list(rng.sample(key_values, count))]
    for column in columns:
        if column.is_text:
            few = rng.sample(column.values, min(len(column.values), rng.choice((3, 4))))
            drawn.append([*few, *rng.choices(few, k=count - len(few))])
            rng.shuffle(drawn[-1])
        else:
            choices = range(column.low, column.high + 1, column.step)
            drawn.append(list(rng.sample(choices, count)))
    return tuple(zip(*drawn, strict=True))


def make_table(
    rng: random.Random,
    noun: str,
    key: str,
    key_values: tuple[str, ...],
    columns: tuple[Column, ...],
    count: int = 7,
) -> Table:
    """A filled table: its key column first, then the columns in the order given."""
    rows = _rows(rng, key_values, columns, count)
    return Table(noun, (Column(key, key_values), *columns), rows)


def _pick(rng: random.Random, names: tuple[str, ...], count: int) -> tuple[Column, ...]:
    """Columns with at least one text and one number among them."""
    chosen = [COLUMNS[name] for name in names]
    while True:
        picked = rng.sample(chosen, count)
        if 0 < sum(c.is_text for c in picked) < count:
            return tuple(picked)


def pretrain_table(rng: random.Random) -> Table:
    """A table for pre-training; about half carry odd or invented words, to force reading the schema."""
    theme = rng.choice(THEMES)
    columns = _pick(rng, theme.columns, rng.choice((2, 2, 3, 3, 4)))
    noun = rng.choice(theme.pretrain)
    keys = KEYS[theme.key]
    if rng.random() < 0.55:
        noun = words.invented(rng) if rng.random() < 0.5 else rng.choice(UNUSUAL)
    if noun in EXAMPLES:  # an invented word may happen to be a real one
        noun = rng.choice(theme.pretrain)
    if rng.random() < 0.3:
        columns = tuple(_disguised(rng, c) if rng.random() < 0.5 else c for c in columns)
    if rng.random() < 0.3:
        keys = tuple(sorted({words.invented(rng).title() for _ in range(20)}))
    return make_table(rng, noun, theme.key, keys, columns, count=6)


def _disguised(rng: random.Random, column: Column) -> Column:
    """The column under an invented name, and with invented words if it holds text."""
    values = column.values
    if column.is_text and rng.random() < 0.6:
        values = tuple(sorted({words.invented(rng) for _ in range(6)}))
    return Column(words.invented(rng), values, column.low, column.high, column.step)


def example_table(rng: random.Random, noun: str) -> Table:
    """A table for the example data, about a noun that pre-training never used as a table."""
    theme = next(t for t in THEMES if noun in t.examples)
    pool = (*theme.columns, *theme.example_columns)
    return make_table(rng, noun, theme.key, KEYS[theme.key], _pick(rng, pool, rng.choice((2, 3, 3, 3, 4))))
