"""How stories begin and end, whatever happens between."""

from __future__ import annotations


def _lines(text: str) -> tuple[str, ...]:
    return tuple(text.strip().splitlines())


POOLS = {
    "open": _lines(
        """
Once upon a time there was {a_hero}{named}.
Once upon a time there lived {a_hero}{named}.
Once upon a time {a_hero}{named} lived {at_home}.
Once upon a time there was {a_hero}{named} who lived {at_home}.
Once upon a time, {at_home}, there lived {a_hero}{named}.
Once there was {a_hero}{named} who lived {at_home}.
There once was {a_hero}{named}. {He} lived {at_home}.
{At_home} lived {a_hero}{named}.
A long time ago, {a_hero}{named} lived {at_home}.
{Proper} was {a_hero} who lived {at_home}.
{?family}{Proper} was {a_hero}. {He} lived {at_home} with {his} mother and father.
This is the story of {a_hero}{named}.
Let me tell you about {a_hero}{named} who lived {at_home}.
Not so long ago there was {a_hero}{named}.
Far, far away there lived {a_hero}{named}.
Do you know {proper}? {Proper} was {a_hero} who lived {at_home}.
"""
    ),
    "friends": _lines(
        """
From that day on, {name} and {friend} were [best|good|the best of] friends.
{Name} and {friend} played together [every day|almost every day] after that.
After that, {name} and {friend} did everything together.
After that, {name} was never alone again, because {friend} was always near.
They smiled at each other and knew that they would be friends for a long time.
{!sky}{Name} and {friend} went home side by side, [happy and tired|talking and laughing].
{Name} and {friend} were friends, and they stayed friends for ever.
And {name} knew that a good friend is the best thing of all.
"""
    ),
    "home": _lines(
        """
Then {name} went home, tired but happy.
Then {name} went home with a big smile.
When the sun went down, {name} went home and told everyone about the day.
It had been a good day, and {name} [sang|smiled] all the way home.
{?family}{Name} went home and told {his} mother and father all about it.
It was [late|time to go], so {name} [waved|said goodbye] and went home.
"What a [good|wonderful] day!" {name} said on the way home.
"""
    ),
    "sleep": _lines(
        """
That night {name} slept well and had sweet dreams.
That night {name} fell asleep with a smile.
When the stars came out, {name} was already [fast asleep|sleeping].
In bed {name} closed {his} eyes, thought of the happy day, and fell asleep.
In the evening {name} was so tired that {he} fell asleep at once.
And that night {name} dreamed of all the good things of the day.
"""
    ),
}
