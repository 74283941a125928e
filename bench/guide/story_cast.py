"""Who and what one story is about: its slots, the same throughout."""

from __future__ import annotations

import random

from bench.guide.story_words import (
    ELDERS,
    FRIENDS,
    HOMES,
    NAMES,
    WALKERS,
    Hero,
    Place,
    Thing,
)

PRONOUNS = {
    "f": ("she", "her", "her", "herself"),
    "m": ("he", "him", "his", "himself"),
    "n": ("it", "it", "its", "itself"),
}
ANY_TIME = (
    "one day",
    "one morning",
    "one sunny day",
    "one bright morning",
    "one fine day",
    "one afternoon",
    "one warm afternoon",
    "one quiet morning",
    "on a sunny morning",
    "one day in spring",
    "early one morning",
)
EVENINGS = (
    "one evening",
    "one night",
    "one clear night",
    "one warm evening",
    "one quiet night",
    "early one evening",
    "on a summer evening",
)
FEELINGS = {
    "happy": ("happy", "so happy", "very happy", "full of joy"),
    "sad": ("sad", "very sad"),
}
ANY_HOMES = ("in a small house", "in a big old house", "in a house with a red roof")
NEAR = ("in a small house near {place}", "not far from {place}")


class Cast:
    """The tale of the grammar, for one hero, one thing and one place."""

    def __init__(self, rng: random.Random, hero: Hero, thing: Thing | None, place: Place | None) -> None:
        self.rng = rng
        self.introduced = False
        self.tags: set[str] = {hero.kind, hero.noun, *hero.tags}
        self.group = "walker" if hero.kind in WALKERS else hero.kind
        self.tags.add(self.group)
        self.slots: dict[str, str] = {}
        self.times: set[str] = set()
        self._hero(hero, with_it=thing is None)
        self._friend(hero)
        self._elder()
        if thing is not None:
            self._thing(thing)
        if place is not None:
            self._place(place)
        self._home(hero, place)

    def value(self, slot: str) -> str | None:
        if slot == "one_day":
            return self._time()
        if slot == "intro":
            return self._first_or_later()
        if slot == "a_hero":
            self.introduced = True
        if slot == "the_thing" and "thing" in self.slots:
            return "the " + self.slots["adj_thing" if self.rng.random() < 0.3 else "thing"]
        if slot in ("happy", "sad"):
            return self.rng.choice(FEELINGS[slot])
        return self.slots.get(slot)

    def _time(self) -> str:
        """A day of its own each time, and "one day" only first."""
        times = EVENINGS if "star" in self.tags else ANY_TIME
        time = self.rng.choice([time for time in times if time not in self.times])
        self.times |= {time, "one day", "one evening"}
        return time

    def _first_or_later(self) -> str:
        if self.introduced:
            return self.slots["name"]
        self.introduced = True
        return self.slots["a_hero"] + self.slots["named"]

    def _person(self, who: Hero, names: tuple[str, ...], named: float) -> tuple[str, str, str]:
        """Its name as the subject of a sentence, the clause that tells the name, and how others call it."""
        if self.rng.random() < named:
            name = self.rng.choice(names)
            return name, self.rng.choice((f" named {name}", f" called {name}", f" named {name}")), name
        return f"the {who.noun}", "", self.rng.choice((f"little {who.noun}", f"dear {who.noun}"))

    def _hero(self, hero: Hero, with_it: bool) -> None:
        rng = self.rng
        # Where there is a thing, "it" is the thing.
        genders = [gender for gender in hero.genders if gender != "n" or with_it]
        gender = rng.choice(genders)
        name, named, call = self._person(hero, NAMES[rng.choice("mf") if gender == "n" else gender], 0.8)
        if gender == "n" and named:
            name = call = rng.choice(NAMES["n"])
            named = f" named {name}"
        if named:
            self.slots["proper"] = name
        look = rng.choice([look for look in hero.looks if look not in hero.label.split()])
        described = f"{look} {hero.label}" if rng.random() < 0.7 else hero.label
        he, him, his, himself = PRONOUNS[gender]
        self.slots |= {
            "a_hero": f"a {described}",
            "kind": hero.label,
            "a_kind": f"a {hero.label}",
            "name": name,
            "named": named,
            "call": call,
            "he": he,
            "him": him,
            "his": his,
            "himself": himself,
            "ran": hero.moves.ran,
            "walked": hero.moves.walked,
        }
        self.tags.add("named" if named else "unnamed")
        self.tags.add({"f": "female", "m": "male", "n": "neuter"}[gender])
        if hero.kind in ("animal", "child"):
            self.tags.add("family")

    def _friend(self, hero: Hero) -> None:
        """Of the other gender, so that "he" and "she" are never both."""
        choices = [
            friend for friend in FRIENDS[self.group] if friend.noun not in hero.noun and hero.noun not in friend.noun
        ]
        gender = "m" if "female" in self.tags else "f" if "male" in self.tags else self.rng.choice("mf")
        friend = self.rng.choice([friend for friend in choices if gender in friend.genders])
        names = tuple(name for name in NAMES[gender] if name != self.slots["name"])
        name, named, call = self._person(friend, names, 0.7)
        look = self.rng.choice([look for look in friend.looks if look not in friend.label.split()])
        described = f"{look} {friend.label}" if self.rng.random() < 0.5 else friend.label
        fhe, fhim, fhis, _ = PRONOUNS[gender]
        self.slots |= {
            "a_friend": f"a {described}",
            "fnamed": named,
            "friend": name,
            "fcall": call,
            "pal": f"{name} the {friend.noun}" if named and friend.kind != "child" else name,
            "fhe": fhe,
            "fhim": fhim,
            "fhis": fhis,
        }

    def _elder(self) -> None:
        taken = {"female": "f", "male": "m", "neuter": "n"}
        own = next(gender for tag, gender in taken.items() if tag in self.tags)
        elders = ELDERS[self.group]
        label, gender = self.rng.choice([elder for elder in elders if elder[1] != own] or elders)
        ehe, ehim, ehis, _ = PRONOUNS[gender]
        article = "the" if label in ("moon", "baker", "gardener", "farmer", "old wind") else "a"
        self.slots |= {"a_elder": f"{article} {label}", "elder": f"the {label}", "ehe": ehe, "ehim": ehim, "ehis": ehis}

    def _thing(self, thing: Thing) -> None:
        described = f"{self.rng.choice(thing.looks)} {thing.label}"
        self.tags |= {f"thing {tag}" for tag in thing.tags}
        self.slots |= {
            "thing": thing.label,
            "adj_thing": described,
            "a_thing": f"a {described if self.rng.random() < 0.8 else thing.label}",
            "the_thing": f"the {thing.label}",
        }

    def _place(self, place: Place) -> None:
        the_place = f"the {place.label}"
        self.tags |= place.tags
        where = f"{place.where} {the_place}"
        to = f"to {the_place}"
        if self.group == "sky":
            where = f"high above {the_place}"
        elif self.group == "boat":
            where = self._on_water(place)
        elif self.group == "wheels" and "in" in place.tags:
            where = f"in front of {the_place}"
        self.slots |= {"in_place": where, "to_place": to, "place": the_place, "at_place": f"{place.where} {the_place}"}

    @staticmethod
    def _on_water(place: Place) -> str:
        if place.label in ("river", "lake", "pond"):
            return f"on the {place.label}"
        if place.label == "harbor":
            return "in the harbor"
        water = "water" if place.label in ("beach", "island", "bridge", "lighthouse") else "river"
        return f"on the {water} by the {place.label}"

    def _home(self, hero: Hero, place: Place | None) -> None:
        homes = [home for home in HOMES[hero.home] if place is None or place.label.split()[-1] not in home]
        if place is not None and "out" in place.tags and self.group == "walker" and hero.home != "toy":
            homes.extend(near.format(place=f"the {place.label}") for near in NEAR)
        self.slots["at_home"] = self.rng.choice(homes or ANY_HOMES)
