"""The cast of the stories: who they are about, where they play, what is lost, shared or given, and all the names."""

from __future__ import annotations

from dataclasses import dataclass

WALKERS = frozenset({"animal", "child", "made"})
"""Heroes with legs and something to hold things with; most plots need them."""


@dataclass(frozen=True)
class Moves:
    """How a hero got about: `ran` in a hurry, `walked` without."""

    ran: str
    walked: str


RUNS = Moves("ran", "walked")
HOPS = Moves("hopped", "hopped")
DRIVES = Moves("drove", "rolled")
ROLLS = Moves("rolled", "rolled")
SAILS = Moves("sailed", "sailed")
FLOATS = Moves("floated", "floated")
FLIES = Moves("flew", "flew")

HOMES: dict[str, tuple[str, ...]] = {
    "pet": ("in a small house by the sea", "in a little red house", "in a house with a green door"),
    "wild": ("in a warm hole under a tree", "at the edge of a green wood", "under a big old tree"),
    "farm": ("on a green farm", "in a big red barn", "behind a white fence"),
    "warm": ("by a wide green river", "in the tall yellow grass", "in a warm land far away"),
    "cold": ("by the cold sea", "in the white snow", "in a house made of snow"),
    "dragon": ("in a warm cave", "on top of a green mountain", "in a small cave by the sea"),
    "child": ("in a small house by the sea", "in a little white house", "in a yellow house on a hill"),
    "castle": ("in a castle on a hill", "in a big stone castle", "in a white castle by the sea"),
    "toy": ("in a big toy box", "on a shelf by the window", "in the room at the top of the stairs"),
    "robot": ("in a house full of wheels", "in a shed behind a yellow house", "in a small house on a hill"),
    "wheels": ("in a big shed", "in a shed by the road", "in a shed with a blue door"),
    "boat": ("in a small harbor", "by an old wooden dock", "where the river meets the sea"),
    "sky": ("high up in the sky", "far above the hills", "up in the wide blue sky"),
    "night": ("high up in the night sky", "far above the hills", "up in the sky next to the moon"),
}


@dataclass(frozen=True)
class Hero:
    label: str
    kind: str
    home: str
    looks: tuple[str, ...]
    genders: str = "mf"
    """Of m, f and n (it)."""
    moves: Moves = RUNS
    tags: frozenset[str] = frozenset({"dry"})

    @property
    def noun(self) -> str:
        return self.label.removeprefix("little ")


def _animal(label: str, home: str, looks: str, moves: Moves = RUNS, swims: bool = False) -> Hero:
    tags: frozenset[str] = frozenset() if swims else frozenset({"dry"})
    return Hero(label, "animal", home, tuple(looks.split()), moves=moves, tags=tags)


def _other(label: str, kind: str, home: str, looks: str, genders: str, moves: Moves = RUNS) -> Hero:
    return Hero(label, kind, home, tuple(looks.split()), genders, moves)


ANIMALS = (
    _animal("cat", "pet", "gray black white small"),
    _animal("dog", "pet", "brown black white big"),
    _animal("kitten", "pet", "gray black white tiny"),
    _animal("puppy", "pet", "brown black white little"),
    _animal("rabbit", "wild", "white brown gray little", HOPS),
    _animal("mouse", "wild", "gray brown tiny little"),
    _animal("fox", "wild", "red young little"),
    _animal("bear", "wild", "brown big young"),
    _animal("hedgehog", "wild", "small brown little"),
    _animal("squirrel", "wild", "red brown small"),
    _animal("frog", "wild", "green small little", HOPS, swims=True),
    _animal("duck", "farm", "yellow white little", swims=True),
    _animal("pig", "farm", "pink little round"),
    _animal("lamb", "farm", "white small little"),
    _animal("pony", "farm", "brown white gray"),
    _animal("goat", "farm", "white brown young"),
    _animal("elephant", "warm", "gray big young"),
    _animal("lion", "warm", "young yellow little"),
    _animal("monkey", "warm", "brown small little"),
    _animal("turtle", "warm", "green small young", swims=True),
    _animal("penguin", "cold", "small young little", swims=True),
    _animal("dragon", "dragon", "green red little young"),
)
CHILDREN = (
    _other("girl", "child", "child", "little young", "f"),
    _other("boy", "child", "child", "little young", "m"),
    _other("princess", "child", "castle", "young kind little", "f"),
    _other("prince", "child", "castle", "young kind little", "m"),
)
MADE = (
    _other("little robot", "made", "robot", "shiny clever funny", "mfn"),
    _other("doll", "made", "toy", "little pretty wooden", "f"),
    _other("teddy bear", "made", "toy", "brown soft old", "mf"),
    _other("toy soldier", "made", "toy", "little wooden brave", "m"),
)
WHEELS = (
    _other("train", "wheels", "wheels", "little red green", "mfn", ROLLS),
    _other("truck", "wheels", "wheels", "little yellow blue", "mfn", DRIVES),
    _other("bus", "wheels", "wheels", "little red yellow", "mfn", DRIVES),
    _other("tractor", "wheels", "wheels", "little green red", "mfn", DRIVES),
    _other("fire truck", "wheels", "wheels", "little red shiny", "mfn", DRIVES),
    _other("car", "wheels", "wheels", "little blue green", "mfn", DRIVES),
)
BOATS = (_other("little boat", "boat", "boat", "pretty brave funny", "mfn", SAILS),)
SKY = (
    _other("cloud", "sky", "sky", "little white small", "mfn", FLOATS),
    _other("star", "sky", "night", "little bright tiny", "mfn", FLOATS),
    _other("plane", "sky", "sky", "little silver red", "mfn", FLIES),
)
CAST = ANIMALS + CHILDREN + MADE + WHEELS + BOATS + SKY

FRIENDS: dict[str, tuple[Hero, ...]] = {
    "walker": (*ANIMALS, *CHILDREN[:2], MADE[0]),
    "wheels": WHEELS,
    "boat": (
        _other("ferry", "boat", "boat", "white big", "mf", SAILS),
        _other("sailboat", "boat", "boat", "white blue", "mf", SAILS),
    ),
    "sky": (
        _other("bird", "sky", "sky", "small blue red", "mf", FLIES),
        _other("kite", "sky", "sky", "red yellow paper", "mf", FLIES),
        _other("balloon", "sky", "sky", "red green round", "mf", FLOATS),
    ),
}

ELDERS: dict[str, tuple[tuple[str, str], ...]] = {
    "walker": (
        ("old owl", "m"),
        ("old woman", "f"),
        ("old man", "m"),
        ("old crow", "m"),
        ("old goose", "f"),
        ("baker", "f"),
        ("gardener", "m"),
        ("farmer", "m"),
    ),
    "wheels": (("old van", "m"), ("old wagon", "f"), ("big crane", "m")),
    "boat": (("old ship", "f"), ("old seagull", "m"), ("big whale", "f")),
    "sky": (("moon", "f"), ("old wind", "m")),
}

SHE_NAMES = "Mia Lily Anna Rosie Bella Nora Ella Lucy Daisy Molly Tilly Ruby Poppy Zoe Emma Sara"
HE_NAMES = "Tom Ben Max Leo Sam Tim Jack Finn Oscar Toby Noah Milo Theo Paul Otto Hugo"
IT_NAMES = "Pip Dot Bo Zip Bim Kiki"
NAMES = {gender: tuple(names.split()) for gender, names in (("f", SHE_NAMES), ("m", HE_NAMES), ("n", IT_NAMES))}


@dataclass(frozen=True)
class Place:
    label: str
    where: str
    """The preposition for being there."""
    tags: frozenset[str]


def _places(where: str, tags: str, labels: str) -> tuple[Place, ...]:
    return tuple(Place(label, where, frozenset(tags.split()) | {label}) for label in labels.split(", "))


ALL_PLACES = (
    *_places("in", "out green soil house", "garden, park"),
    *_places("in", "out green wild soil", "forest, meadow, field, jungle, valley"),
    *_places("in", "out green wild soil house", "orchard"),
    *_places("on", "out green soil house", "farm"),
    *_places("on", "out green wild soil", "hill, mountain, island"),
    *_places("by", "out green wild water", "river, lake, pond"),
    *_places("on", "out sand water", "beach"),
    *_places("in", "out town house", "village, town, harbor"),
    *_places("at", "out town house", "market, zoo"),
    *_places("at", "out green", "playground"),
    *_places("by", "out town", "bridge"),
    *_places("in", "in house", "castle, library, barn, bakery, toy shop, museum, lighthouse"),
    *_places("in", "in house room", "kitchen"),
    *_places("in", "in room", "tree house, attic"),
    *_places("at", "in house", "school, train station"),
)


@dataclass(frozen=True)
class Thing:
    label: str
    looks: tuple[str, ...]
    tags: frozenset[str]


def _thing(label: str, looks: str, tags: str) -> Thing:
    found = {"any", *tags.split()}
    if "keep" in found and "nature" not in found:
        found.add("made")
    return Thing(label, tuple(looks.split()), frozenset(found))


ALL_THINGS = (
    _thing("ball", "red blue yellow big", "keep toy"),
    _thing("kite", "red blue yellow paper", "keep toy frail"),
    _thing("toy car", "red blue green", "keep toy frail"),
    _thing("drum", "red little round", "keep toy frail loud"),
    _thing("toy boat", "white red wooden", "keep toy frail"),
    _thing("balloon", "red green blue", "keep toy"),
    _thing("jump rope", "long pink green", "keep toy"),
    _thing("whistle", "silver little wooden", "keep toy loud"),
    _thing("bell", "silver gold little", "keep loud"),
    _thing("music box", "little blue old", "keep frail loud"),
    _thing("wooden horse", "little brown white", "keep toy frail"),
    _thing("hat", "red blue funny green", "keep wear"),
    _thing("scarf", "red long yellow soft", "keep wear"),
    _thing("coat", "blue warm brown", "keep wear"),
    _thing("crown", "gold paper shiny", "keep wear"),
    _thing("bucket", "blue red little", "keep"),
    _thing("lamp", "little old yellow", "keep frail"),
    _thing("umbrella", "red yellow big", "keep frail"),
    _thing("basket", "brown little round", "keep frail"),
    _thing("key", "gold old little", "keep"),
    _thing("cup", "blue white pretty", "keep frail"),
    _thing("blanket", "soft blue warm", "keep"),
    _thing("book", "big old blue", "keep"),
    _thing("pillow", "soft white pink", "keep"),
    _thing("clock", "old little round", "keep frail loud"),
    _thing("shell", "white pink pretty", "keep nature"),
    _thing("stone", "round shiny white", "keep nature"),
    _thing("feather", "blue white long", "keep nature"),
    _thing("flower", "red yellow pretty", "nature"),
    _thing("apple", "red green big", "food"),
    _thing("pear", "green yellow big", "food"),
    _thing("orange", "big round sweet", "food"),
    _thing("cake", "big sweet little", "food baked"),
    _thing("pie", "warm big sweet", "food baked"),
    _thing("cookie", "big round sweet", "food baked"),
    _thing("sandwich", "big tasty", "food baked"),
    _thing("pumpkin", "big round orange", "food"),
)
