"""Plots about trucks, trains, cars and boats that help somebody."""

from __future__ import annotations

from bench.guide.story_engines import BOATS, ENGINES, WHEELS
from bench.guide.story_grammar import plot

_PULL_OUT = """
@trouble
in the deep snow
in the thick mud
in a ditch
in a deep hole

?7
<open>

{One_day} {intro} was on the way {to_place}, and {he} was already late.
{One_day} {intro} had to go {to_place}, but the road was bad.
{Intro} {walked} {to_place} {one_day} and sang a song.

Then {he} saw {a_friend}{fnamed} next to the road. {Fhe} was stuck {trouble}.
There stood {a_friend}{fnamed}, stuck {trouble}.
On the way {he} heard {a_friend}{fnamed} call. {Fhe} was stuck {trouble}.

?
"Please help me," said {friend}. "I have been here since morning."
"Nobody stops for me," said {friend}. {Fhe} looked very sad.
"I called and called," said {friend}, "but all the others just went by."

---

"I will be late," thought {name}, "but I cannot leave {fhim} here."
{Name} stopped at once. "I will pull you out," {he} said.
"I do not have much time," thought {name}, "but somebody needs my help."

{He} took a strong rope and tied it to {friend}.
They tied a rope between them with a good knot.

{Name} pulled and pulled, but {friend} did not move.
"Now!" called {name}, and {he} pulled, but it did not help.

?
"I am too heavy," said {friend}. "Go on without me."
"It is no use," said {friend} in a sad voice.

"No, we will try it in another way," said {name}. {He} put some branches under the wheels.
Then {name} had an idea and put dry sand under the wheels.
"I do not give up," said {name}. "This time you must push when I pull."

"One, two, three!" And out came {friend}!
{Name} pulled one more time with all {his} might. And it worked!
It moved a little bit, and then a little bit more. And then {friend} was free!

---

"Thank you!" said {friend}. "You are the only one who stopped."
{Friend} was so happy. "I will never forget this, {call}!" {fhe} said.

?
Then they went {to_place} together, one behind the other.
"Let us go {to_place} together," said {name}. And that is what they did.

?
"Why are you so late?" somebody asked {at_place}. {Friend} told the whole story, and nobody was angry.
{Name} was very late {at_place}. But when people heard why, they all clapped.

?
One week later {name} got stuck too. And who came to help? It was {friend}!
Since that day they always looked out for each other.

It is better to come late than to leave a friend alone.
If you help others, others will help you.
<friends>
"""

_OLD_ONE = """
@laugh, need, fix
{?wheels}slow ; there was ice on the road. An old woman had to go to the doctor, but the fast ones slipped and \
slipped ; {Name} took her to the doctor, slowly and safely
{?wheels}old ; there was a lot of snow. The people in the hills had no bread, but the new ones were afraid to go \
out ; {Name} brought bread to every house
{?wheels}small ; a kitten was lost. Everybody wanted to find it, but the big ones could not get through the narrow \
street ; {Name} went through the street, found the kitten and brought it home
{?boat}small ; a kitten was lost. It sat between two rocks, but the big ones could not get through ; {Name} went in \
between the rocks and brought the kitten home
loud ; there was thick fog, and nobody could find the way home ; {Name} called, "Toot, toot!" And everybody followed \
the sound and came home

<open>

{Name} was already old, and {his} paint was not bright any more.
{Name} was not new any more. {He} had worked for many years.
All the others were new and shiny. Only {name} was old.

"You are much too {laugh}!" the others said and laughed at {him}.
"What good is {a_kind} that is so {laugh}?" the others asked.
The others did not want to play with {him}. "You are too {laugh}," they said.

?
{Name} said nothing. But in the night {he} was {sad}.
"Maybe they are right," {name} thought. "Maybe nobody needs me."
{Name} stood all alone and wished that somebody needed {him}.

---

But {one_day} {need}.
Then came a bad day, because {need}.
The next morning {need}.

?
"Who can help?" the people called. The others looked away.
"We cannot do it," said the new ones. "What now?"
Nobody knew what to do, and the new ones were very quiet.

"I can do it," said {name}. {He} did not wait and set off.
Then {name} came out. "Let me try," {he} said.
"I will go," {name} said. "I have done this many times."

?
{He} knew every stone on the way, because {he} had been there so often.
{He} went carefully and did not stop.
It was not easy, but {name} was not afraid.

{Fix}.
And {he} did it! {Fix}.
It took a long time, but it worked. {Fix}.

---

?
"You saved the day!" the people called. "Thank you, {call}!"
Everybody shouted, "Hooray for {name}!"
The people clapped and sang a song for {name}.

The others were ashamed. "We are sorry that we laughed at you," they said.
"We were wrong," said the others. "Will you teach us what you know?"
Then the others came over. "You are the best of us all," they said softly.

?
"That is all right," said {name}. {He} was not angry.
{Name} forgave them, and they all became good friends.
"I will show you how to do it," {name} said with a smile.

They gave {him} new paint, and now {he} looked as good as new.
And from then on nobody laughed at {name} any more.
Everybody is good at something.
It does not matter how old you are. It matters what you do.
It is not right to laugh at others. Everyone can do something well.
"""

_PASSENGER = """
@who, short
a little girl ; the girl
a little boy ; the boy
a small kitten ; the kitten
a little lamb ; the lamb
@beside
{?wheels}by the road
{?boat}on the shore

?7
<open>

{One_day} {intro} was on the way home. There {he} saw {who} all alone.
{One_day} {intro} heard somebody cry. It was {who}.
It was getting dark when {intro} saw {who} {beside}.

?
"Why are you crying?" asked {name}.
"What are you doing here all alone?" {name} asked.
{Name} stopped. "Can I help you?" {he} asked.

"I am lost," said {short}. "I want to go home to my mother."
"I cannot find my mother," said {short}. "I walked and walked, and now I am lost."

"Where do you live?" {name} asked. "I live near {place}," said {short}. "But I do not know the way."
"Where is your home?" asked {name}. {Short} only knew that it was near {place}.

---

"I know how to get there," said {name}. "Come with me!"
"That is not so far," said {name}. "I will take you {to_place}."

?
So {short} sat down in a warm spot, and off they went.
{Short} was a little afraid at first, but {name} was very kind.

?
They went past dark trees and quiet houses. {Name} sang a song so that {short} was not afraid.
On the way {name} told a funny story, and {short} laughed for the first time.
The moon came up and showed them the way.

?
"Are we almost there?" {short} asked. "Just a little more," said {name}.
Once they took a wrong turn, but {name} soon found the right way again.

"Look, there is a light!" {short} called. It was the right place!
At last they came {to_place}. "I know this!" {short} called.

---

The mother ran out of the door. "There you are! I looked for you all day!" she cried.
There stood the mother with a lamp in the dark. She saw them and cried for joy.

?
She held {short} tight and did not let go for a long time.
They hugged each other and laughed and cried.

"How can I thank you?" the mother asked. "I was glad to help," said {name}.
"Thank you for bringing my little one home," the mother told {name}.

?
{Short} waved until {name} was far away. "Come back soon!"
"Will you come and visit us?" asked {short}. "I will," said {name}.

Then {name} went home too, and {his} heart was warm.
And {name} did come back, every week, and they were good friends.
There is nothing better than to bring somebody home.
{Name} was late that night, but {he} was {happy}.
"""

_LIGHT = """
?6
<open>

One evening {intro} was on the way home over the quiet sea.
One evening {intro} was far out on the water.
It was a quiet evening, and {intro} was not far from the shore.

But then a strong wind came, and the waves got higher and higher.
All at once the wind began to blow, and it got dark very fast.

Then {he} heard somebody call, "Help! I cannot find the harbor!"
"Help!" somebody called out of the dark. "I do not know the way!"

It was {a_friend}{fnamed} who was afraid and went around and around.
There was {a_friend}{fnamed}. {Fhis} light was broken, and {fhe} could not see a thing.

---

"Follow me!" called {name}. "I know the way."
"Stay right behind me," said {name} and turned on {his} little lamp.

{Name} was small, and the waves were big, but {he} did not turn back.
The water splashed, and the wind cried, but {name} held {his} lamp high.

?
Up they went and down they went, up and down, on and on.
"Can you see my light?" {name} called. "Yes!" called {friend}.
"Do not be afraid!" {name} called again and again.

?7
Once {friend} fell behind. {Name} waited until {fhe} was there again.
{Name} sang a loud song, so that {friend} could hear where {he} was.

At last they saw the light of the lighthouse.
Then there was a bright light in front of them. It was the lighthouse!

?
"We are almost home!" {name} shouted.
"Just a little more," said {name}. "You can do it!"

---

Soon they were in the harbor, where it was quiet and safe.
And then they were safe in the harbor, side by side.

"I was so afraid," said {friend}, "but your little light showed me the way."
"You are small," said {friend}, "but you are the bravest of us all."

?
"I was afraid too," said {name}. "But two are braver than one."
{Name} smiled. "It was only a little lamp," {he} said.

A small light can help a lot when it is dark.
The next day the sun was shining, and they sailed out together.
That night they slept side by side, and the waves rocked them softly.
<friends>
"""

RESCUE_PLOTS = (
    plot("pull out", WHEELS, _PULL_OUT, place="any"),
    plot("old one", ENGINES, _OLD_ONE),
    plot("passenger", ENGINES, _PASSENGER, place="out"),
    plot("light", BOATS, _LIGHT),
)
