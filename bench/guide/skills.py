"""What the guide can do besides talk about swarmcpp: count, sort words, small sums, and say that it does not know."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable
from pathlib import Path

from bench.guide.wordlists import CITIES, COUNTRIES, GROUPS, NOUNS, NUMBERS, PEOPLE, SUBJECTS

_CHATTER = tomllib.loads(Path(__file__).with_name("chatter.toml").read_text(encoding="utf-8"))

Exchange = tuple[str, str]
"""What a user asks, without final punctuation, and the answer."""

LARGEST = 20
"""Of the numbers in sums and counts."""


def _number(rng: random.Random, value: int) -> str:
    return NUMBERS[value] if value < len(NUMBERS) and rng.random() < 0.25 else str(value)


# -- counting ----------------------------------------------------------------------------------------------------------

_COUNT = (
    "count from {a} to {b}",
    "count {a} to {b}",
    "please count from {a} up to {b}",
    "can you count from {a} to {b}",
    "can you count from {a} up to {b} for me",
    "what are the numbers from {a} to {b}",
    "list the numbers from {a} to {b}",
    "list all numbers between {a} and {b}, both included",
    "give me the numbers {a} to {b}",
    "give me every number from {a} through {b}",
    "say the numbers from {a} to {b}",
    "write the numbers from {a} to {b}",
    "start at {a} and count to {b}",
    "start counting at {a} and stop at {b}",
    "begin with {a} and count until you reach {b}",
    "which numbers come from {a} to {b}",
    "numbers {a} to {b}",
    "count up from {a} to {b}",
    "I want to hear you count from {a} to {b}",
    "show me how you count from {a} to {b}",
    "let us count, from {a} to {b}",
    "my little brother learns to count, count from {a} to {b} for him",
    "could you count out loud from {a} to {b}",
    "go from {a} to {b}, number by number",
)
_COUNT_TO = (
    "count to {b}",
    "can you count to {b}",
    "please count up to {b}",
    "count up to {b} for me",
    "how do you count to {b}",
    "count until {b}",
)
_COUNT_DOWN = (
    "count down from {b} to {a}",
    "count backwards from {b} to {a}",
    "count from {b} down to {a}",
    "can you count backwards from {b} to {a}",
    "do a countdown from {b} to {a}",
    "the numbers from {b} down to {a}",
)


def counting(rng: random.Random) -> Exchange:
    """Numbers in their order, at most twelve."""
    kind = rng.random()
    if kind < 0.15:
        low, high, form = 1, rng.randint(2, 15), rng.choice(_COUNT_TO)
    else:
        low = rng.randint(0 if kind < 0.2 else 1, LARGEST + 10)
        high = low + rng.randint(2, 11)
        form = rng.choice(_COUNT_DOWN if kind > 0.85 else _COUNT)
    numbers = range(high, low - 1, -1) if form in _COUNT_DOWN else range(low, high + 1)
    ask = form.format(a=_number(rng, low), b=_number(rng, high))
    return ask, ", ".join(map(str, numbers)) + "."


# -- sorting -----------------------------------------------------------------------------------------------------------

_SORT = (
    "sort these words: {words}",
    "sort these words alphabetically: {words}",
    "sort these words by the alphabet: {words}",
    "put these words in alphabetical order: {words}",
    "put {words} in alphabetical order",
    "put {words} in order from A to Z",
    "can you sort {words}",
    "can you sort {words} alphabetically",
    "can you put these in order: {words}",
    "order these words: {words}",
    "order alphabetically: {words}",
    "alphabetical order please: {words}",
    "alphabetize {words}",
    "arrange these from A to Z: {words}",
    "arrange {words} alphabetically",
    "which order do {words} have in the alphabet",
    "I have the words {words}, sort them",
    "what is the alphabetical order of {words}",
    "please sort: {words}",
    "sort {words}",
    "sort the words {words}",
    "sort the list {words}",
    "how would a dictionary order {words}",
    "these are out of order, sort them by alphabet: {words}",
    "could you bring {words} into alphabetical order",
)


def sorting(rng: random.Random) -> Exchange:
    """Three to five words in alphabetical order."""
    source = rng.choice(GROUPS) if rng.random() < 0.3 else NOUNS
    words = rng.sample(source, rng.choice((3, 3, 3, 4, 4, 5)))
    joined = ", ".join(words)
    if rng.random() < 0.3:
        joined = f"{', '.join(words[:-1])} and {words[-1]}"
    elif rng.random() < 0.1:
        joined = " ".join(words)
    return rng.choice(_SORT).format(words=joined), ", ".join(sorted(words)) + "."


# -- sums --------------------------------------------------------------------------------------------------------------

_SUMS = (
    "what is {sum}",
    "what's {sum}",
    "how much is {sum}",
    "calculate {sum}",
    "compute {sum}",
    "can you tell me what {sum} is",
    "what does {sum} make",
    "{sum}",
    "{sum} =",
    "what do you get for {sum}",
    "tell me {sum}",
    "do you know {sum}",
    "solve {sum}",
    "work out {sum}",
    "I need help with a sum: {sum}",
    "my homework says {sum}",
    "quick, {sum}",
    "the result of {sum}",
    "please add it up for me: {sum}",
)
_PLUS = ("{a} plus {b}", "{a} + {b}", "{a}+{b}", "{a} and {b} together", "the sum of {a} and {b}")
_MINUS = ("{a} minus {b}", "{a} - {b}", "{a}-{b}", "{a} take away {b}", "{a} less {b}")
_TIMES = ("{a} times {b}", "{a} * {b}", "{a} x {b}", "{a} multiplied by {b}")
_THINGS_PLUS = (
    "I have {a} {thing}s and get {b} more, how many do I have",
    "there are {a} {thing}s and {b} more come, how many are there now",
    "if I add {b} to {a}, what do I get",
    "add {a} and {b}",
    "add {b} to {a}",
)
_THINGS_MINUS = (
    "I have {a} {thing}s and give away {b}, how many are left",
    "there were {a} {thing}s and {b} went away, how many are left",
    "subtract {b} from {a}",
    "take {b} away from {a}, what is left",
    "if you take {b} from {a}, how much is left",
)
_COUNTED = ("apple", "ball", "bird", "book", "cookie", "coin", "duck", "egg", "flower", "pencil", "sheep", "stone")


def sums(rng: random.Random) -> Exchange:
    """One addition, subtraction or multiplication of small numbers."""
    kind = rng.random()
    if kind < 0.5:
        a, b = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
        forms, story, sign, result = _PLUS, _THINGS_PLUS, "plus", a + b
    elif kind < 0.85:
        a = rng.randint(0, LARGEST)
        b = rng.randint(0, a)
        forms, story, sign, result = _MINUS, _THINGS_MINUS, "minus", a - b
    else:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        forms, story, sign, result = _TIMES, (), "times", a * b
    if story and rng.random() < 0.25:
        thing = rng.choice(_COUNTED)
        ask = rng.choice(story).format(a=_number(rng, a), b=_number(rng, b), thing=thing).replace("sheeps", "sheep")
    else:
        words = rng.choice(forms).format(a=_number(rng, a), b=_number(rng, b))
        ask = rng.choice(_SUMS).format(sum=words)
    return ask, f"{a} {sign} {b} is {result}."


# -- not known ---------------------------------------------------------------------------------------------------------

_BEYOND = (
    "what is the capital of {country}",
    "which city is the capital of {country}",
    "capital of {country}",
    "how many people live in {country}",
    "how many people live in {city}",
    "where is {country}",
    "where is {city}",
    "how far is it from {city} to {city2}",
    "which language do they speak in {country}",
    "what is the weather in {city}",
    "what's the weather like today",
    "will it rain tomorrow",
    "how warm is it in {city} right now",
    "what happened in {country} today",
    "what is in the news",
    "any news today",
    "who won the match last night",
    "who won the world cup",
    "who won the election in {country}",
    "who is {person}",
    "who was {person}",
    "when was {person} born",
    "how old is {person}",
    "where does {person} live",
    "what did {person} do",
    "tell me about {person}",
    "tell me about {subject}",
    "explain {subject} to me",
    "what do you know about {subject}",
    "what is {subject}",
    "can you teach me {subject}",
    "I want to learn about {subject}",
    "give me a summary of {subject}",
    "write an essay about {subject}",
    "write a poem about {subject}",
    "what is the best book about {subject}",
    "why is {subject} important",
    "translate this into {language}",
    "how do you say hello in {language}",
    "what does {word} mean in {language}",
    "do you speak {language}",
    "write me a program in {code}",
    "how do I sort a list in {code}",
    "fix this {code} bug for me",
    "my head hurts, what should I take",
    "I have a fever, what should I do",
    "which medicine helps against a cold",
    "is this mole dangerous",
    "should I buy {stock} shares",
    "what is the price of {stock}",
    "how much is {stock} worth",
    "what is the exchange rate of the dollar",
    "how do I cook {food}",
    "give me a recipe for {food}",
    "how many calories does {food} have",
    "what time is it",
    "what day is it today",
    "what is the date",
    "when is the next train to {city}",
    "book me a flight to {city}",
    "find me a hotel in {city}",
    "what is the best restaurant in {city}",
    "what is the meaning of life",
    "who will win the next election",
    "when did the {event} end",
    "in which year was the {event}",
    "how tall is the tallest mountain",
    "how deep is the ocean",
    "how many stars are there",
    "what is the largest animal in the world",
    "who invented the {invention}",
    "who wrote {work}",
    "who painted {work}",
    "what is the square root of {big}",
    "what is {big} times {big2}",
    "what is {big} divided by {big2}",
    "how many days until Christmas",
    "which film should I watch tonight",
    "recommend me a good {medium}",
    "what is the plot of {work}",
    "how do I fix my {appliance}",
    "how do I remove a stain from a {cloth}",
    "can I sue my landlord",
    "how do I file my taxes",
    "is {subject} true",
    "what is your opinion on {subject}",
    "what should I study",
    "how do I become rich",
    "does my friend like me",
    "what is the tallest building in {city}",
    "name the rivers of {country}",
    "what do people eat in {country}",
    "which currency does {country} have",
    "what is the flag of {country}",
    "what do {animal}s eat",
    "how long does a {animal} live",
    "how fast is a {animal}",
    "how many legs does a {animal} have",
    "what is the chemical symbol of {metal}",
    "at what temperature does {metal} melt",
    "what is the phone number of {person}",
    "where can I buy a {thing}",
    "how much does a {thing} cost",
    "how is a {thing} made",
    "who is the best singer in the world",
    "who is the president of {country}",
    "who rules {country}",
)
_FILL: dict[str, tuple[str, ...]] = {
    "country": COUNTRIES,
    "city": CITIES,
    "city2": CITIES,
    "person": PEOPLE,
    "subject": SUBJECTS,
    "language": (
        "French",
        "German",
        "Spanish",
        "Italian",
        "Chinese",
        "Japanese",
        "Latin",
        "Russian",
        "Turkish",
        "Polish",
    ),
    "word": NOUNS,
    "thing": NOUNS,
    "code": ("Java", "C", "Rust", "JavaScript", "Go", "PHP", "Haskell", "Ruby", "SQL", "Swift"),
    "stock": ("Apple", "Tesla", "Google", "gold", "bitcoin", "oil", "silver", "Amazon", "ether"),
    "food": ("pasta", "pizza", "rice", "soup", "pancakes", "bread", "a cake", "chicken", "fish", "lasagne", "curry"),
    "event": ("First World War", "French Revolution", "Cold War", "moon landing", "Middle Ages", "fall of Rome"),
    "invention": ("telephone", "radio", "light bulb", "computer", "printing press", "steam engine", "wheel", "bicycle"),
    "work": ("Hamlet", "the Mona Lisa", "Faust", "Moby Dick", "the Bible", "the Odyssey", "Star Wars", "Titanic"),
    "medium": ("film", "book", "song", "album", "game", "series", "podcast", "restaurant"),
    "appliance": ("fridge", "car", "washing machine", "phone", "bike", "oven", "sink", "television"),
    "cloth": ("shirt", "carpet", "dress", "sofa", "tie", "jacket"),
    "animal": ("tiger", "shark", "horse", "penguin", "spider", "snail", "whale", "rabbit", "bat", "camel", "koala"),
    "metal": ("gold", "iron", "silver", "copper", "lead", "zinc", "tin", "mercury"),
    "big": ("137", "48", "999", "1024", "77", "64", "365", "250", "81"),
    "big2": ("13", "29", "17", "43", "58", "99", "31"),
}
_DO_NOT_KNOW = (
    "I do not know that. I am a small model: I know swarmcpp, small sums and stories.",
    "I do not know. I only know swarmcpp, small sums and stories; a bigger model can help you with that.",
    "I do not know that, sorry. Ask me about swarmcpp, or serve a bigger model.",
)


def unknown(rng: random.Random) -> Exchange:
    """A question that is beyond a model of this size."""
    if rng.random() < 0.5:
        return rng.choice(_CHATTER["beyond"]), rng.choice(_DO_NOT_KNOW)
    fill = {name: rng.choice(words) for name, words in _FILL.items()}
    return rng.choice(_BEYOND).format(**fill), rng.choice(_DO_NOT_KNOW)


SKILLS: tuple[tuple[Callable[[random.Random], Exchange], float], ...] = (
    (counting, 1.0),
    (sorting, 1.5),
    (sums, 1.5),
    (unknown, 2.0),
)
"""Each with its weight."""
