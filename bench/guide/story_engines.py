"""Plots about trucks, trains, cars and boats."""

from __future__ import annotations

from bench.guide.story_grammar import plot

WHEELS = frozenset({"wheels"})
BOATS = frozenset({"boat"})
ENGINES = WHEELS | BOATS

_ERRAND = """
@who, the_who, she
{!female}a little girl ; the girl ; she
{!male}a little boy ; the boy ; he
{!female}an old woman ; the old woman ; she
{!male}an old man ; the old man ; he

?7
<open>

{One_day} somebody gave {intro} {a_thing}. "Please take it {to_place}," they said. "{Who} is waiting for it."
{Intro} had an important job. {He} had to bring {a_thing} {to_place}. {Who} was waiting for it there.
"Can you take {a_thing} {to_place}?" {intro} was asked {one_day}. "It is for {who}." "Yes, I can!"

?
"I will be careful," said {name}, and {he} set off.
{Name} was proud of the job. Off {he} went!
{Name} put it in a safe place and {walked} off with a happy song.

?
The sun was shining, and everything went well.
First {he} went past green hills and little houses.
{He} said hello to everyone on the way.
"""

_ARRIVAL = """
---

In the evening {name} was there at last. {The_who} came out and waved.
Late in the day {he} came {to_place}. There stood {the_who} with a big smile.
When the sun went down, {name} was there. {The_who} had waited all day {at_place}.

?8
"Here is your {thing}," said {name}. "I am sorry that I am so late."
"This is for you," {name} said. "It was a long way."
"I have something for you," said {name} and held out {the_thing}.

"Thank you!" {she} said. "You came all this way, just for me!"
"Oh, {the_thing}! I am so glad," {she} said. "You are the best {kind} in the world."
{She} laughed for joy and patted {name}. "You did not give up," {she} said.

?
{Name} was tired, but {he} was {happy}.
It was a hard day, but {name} had kept {his} word.
All the way home {name} sang, and the moon lit the way.

When you make a promise, you keep it.
And the next day {name} was ready for a new job.
It was a good feeling to be so useful.
Everybody said, "If it is important, give it to {name}!"
That night {name} slept well and dreamed of {the_who} and {the_thing}.
"""

_BLOCKED = """
@block, way
{?wheels}a big tree lay across the road ; {Name} pushed and pushed until it rolled away
{?wheels}a lot of sheep stood on the road ; {Name} waited until the last sheep was on the other side
{?wheels}there was deep mud on the road ; {Name} went very slowly, and {his} wheels turned and turned
{?wheels}it began to snow ; {Name} turned on {his} lights and went on slowly
{?boat}fog came up, and nobody could see a thing ; {Name} went slowly and listened to the bell of the lighthouse
{?boat}the wind blew hard, and the waves got high ; {Name} went up and down with each wave and did not stop
{?boat}a big log lay in the water ; {Name} pushed and pushed until it floated away

---

But then {block}. "Oh no!" said {name}.
But after a while {block}. What now?
Then {block}. {Name} had to stop.

"I cannot go home," {he} said. "{The_who} is waiting."
"I gave my word," thought {name}. "I will not give up."
{Name} thought about {the_who} who was waiting. {He} had to find a way.

?
A bird sat down next to {him}. "It is too hard," said the bird. "No, it is not," said {name}.
It would have been easy to turn around. But {name} did not do that.
{Name} took a deep breath.

{Way}.
{Name} did not give up. {Way}.
There was only one way to do it. {Way}.

?
It took a long time, but then {he} could go on.
"I did it!" {he} called and went on.
After that, the rest of the way was easy.
"""

_DROPPED = """
---

But when {name} looked back, {the_thing} was gone!
There was a bump, and {name} felt that something was wrong. {The_thing} was not there any more!
Then {name} heard a soft sound behind {him}. {The_thing} had fallen off!

"Oh no!" {he} cried. "{The_who} is waiting for it. What can I do?"
"How could I lose it?" {he} said. "I said that I would be careful."
{Name} felt {sad}. "I must find it," {he} said.

{Name} turned around and went all the way back. {He} looked to the left and to the right.
{He} went back at once and looked everywhere.
So {he} went back, bit by bit, and looked at every stone.

?
{He} asked {a_elder}, "Have you seen {a_thing}?" "No," said {elder}, "but look near the old tree."
{He} found an old shoe and a green bottle, but no {thing}.
It got late, but {name} did not stop looking.

{?wheels}There it was, next to the road! It had landed softly in the grass.
{?wheels}At last {he} saw it in some soft leaves under a tree.
{?boat}There it was, next to the water! It had landed softly on the sand.
{?boat}At last {he} saw it on the shore in some soft grass.

?
This time {name} tied it with a strong rope.
{He} was so glad that {he} sang out loud. Then {he} hurried on.
"Now I will look back more often," said {name}.
"""

_HILL = """
@load
apples and bread
toys and books
new beds
flowers for a party
milk and cheese
@big
{!train}big black train
{!bus}big new bus
{!truck}{!fire truck}big new truck

<open>

The children {at_place} were waiting. They needed {load}, but there was a very high hill on the way.
{One_day} somebody had to bring {load} to the children {at_place}. But the way went over a very high hill.
The children {at_place} wanted {load}, but the only way went over the highest hill of all.

First they asked the {big}. "I have no time for that," said the {big} and went away.
"I am too fine for such work," said the {big}.
They asked the {big}. "That hill is too high," it said. "I will not do it."

Then they asked {name}. "I am small," {he} said, "but I can try."
{Name} heard this. "I am not very strong," {he} said, "but I want to help."
"Can you do it, {call}?" they asked. {Name} looked up at the hill. "I will do my best," {he} said.

---

So {he} took everything and began to go up. It was very heavy.
Up and up {he} {walked}, slower and slower.
It was steep, and the load was heavy. {Name} went very slowly.

?
"One more turn of the wheels," {he} said to {himself}, "and then one more."
"A little bit, and a little bit more," {he} sang quietly.
"I will not look at the top," thought {name}. "I will only look at the next tree."

?
In the middle of the hill {he} almost stopped. {He} was so tired!
Half way up {he} had to rest. "Shall I go back?" {he} thought.
Then the road got even steeper. {His} wheels began to slip.

But {he} thought of the children who were waiting, and {he} went on.
A small bird sat down next to {him} and sang, "Go on, go on!" That helped.
Then {he} took a deep breath and tried once more.

---

And then {he} was at the top! {He} could see everything from there.
At last there was no more hill. {He} had done it!
One last pull, and {he} was at the top!

?
Down the other side {he} went, faster and faster. It was fun!
After that, it was easy. {He} rolled down with a happy song.

"Hooray!" shouted the children {at_place}. They all ran out to meet {name}.
{At_place} the children danced and clapped. "You did it, {call}!" they shouted.

?
{Name} was tired and very, very proud.
They put flowers all over {name} and sang a song for {him}.
"How did you do it?" they asked. "Bit by bit," said {name}.

If you go on bit by bit, you can get over every hill.
You do not have to be big to do big things.
And when the {big} heard about it, it was very quiet.
That night {name} slept well in {his} shed.
"""

_BUMP = """
@what, after, who, she
{?wheels}{!male}the fence of a farmer ; the fence was broken ; the farmer ; he
{?wheels}{!female}a row of flower pots ; all the pots were broken ; an old woman ; she
{?wheels}{!female}a white gate ; the gate was in two pieces ; an old woman ; she
{?wheels}{!male}a wooden wall ; there was a big hole in it ; an old man ; he
{?boat}{!male}an old dock ; three boards were broken ; an old man ; he
{?boat}{!female}a row of flower pots on the dock ; all the pots were broken ; an old woman ; she

?6
<open>

{One_day} {intro} was on the way {to_place}, and {he} went much too fast.
{One_day} {intro} {ran} {to_place} and did not look where {he} went.
{One_day} {intro} was in a hurry to get {to_place}, because {he} wanted to be the first of all.

?
"Look how fast I am!" {he} shouted.
{He} looked at a bird in the sky and not at the way.
"Not so fast!" somebody called, but {name} only laughed.

Bump! {He} hit {what}, and now {after}.
There was a loud crash. {He} had hit {what}, and {after}.
And then {he} hit {what}, and {after}.

?
{Name} looked around. Nobody had seen it.
Nobody was there, so nobody knew who did it.
"I will not say anything," {he} thought.

So {he} went away very fast and told nobody.
{Name} was afraid, so {he} did not stop and did not say a word.

---

But that night {name} could not sleep.
But {name} was not happy and thought about it all day long.
But the mistake was like a stone in {his} heart.

?
"Somebody is sad now because of me," {he} thought.
"What if somebody did that to me?" {he} thought.

The next morning {he} went back, and there stood {who} with a sad face.
As soon as it was light, {he} went back, and {who} was there.

"It was me," said {name}. "I was too fast, and then I ran away. I am very sorry."
{Name} took a deep breath. "I did this," {he} said softly, "and I am very sorry."

{She} was quiet for a while. "It was good that you came back," {she} said.
"I was angry," {she} said, "but it is brave to tell the truth."

---

"Can I help to mend it?" asked {name}. "Yes, you can," {she} said.
"I want to put it right," said {name}, and {he} began to work.

?
{Name} brought new wood, and they worked until noon.
{Name} brought everything that was needed, and they worked side by side.

Then it was as good as new. "Well done," {she} said.
In the evening everything was whole again and looked better than before.

After that, {name} went slowly and looked where {he} was going.
And {name} never ran away from a mistake again.
Everybody makes mistakes. It is important to put them right.
That night {name} slept very well.
"""

_ON_THE_WAY = """
@owner, the_owner, she, her
{!female}a little girl ; the girl ; she ; her
{!male}a little boy ; the boy ; he ; him
{!female}an old woman ; the old woman ; she ; her
{!male}an old man ; the old man ; he ; him
@beside
{?wheels}next to the road
{?boat}on the shore

?6
<open>

{One_day} {intro} was on the way {to_place}. There {he} saw {a_thing} {beside}.
{One_day} {intro} {walked} along and sang a song. Then {he} saw {a_thing} {beside}.
{One_day} {intro} found {a_thing} {beside}.

"Who has lost this?" {he} asked, but nobody was there.
"Somebody must be very sad now," said {name}.
{Name} liked it very much, but it was not {his}.

?
"I could keep it," {he} thought. "But that would not be right."
{Name} took it along. "I will find out whose it is," {he} said.
{Name} waited for a while, but nobody came back for it.

---

First {he} met {a_friend}{fnamed}. "Is this yours?" {name} asked. "No," said {friend}, "but I can help you to ask."
{A_friend}{fnamed} came along. "Did you lose {a_thing}?" asked {name}. "No," said {friend}, "but I will ask with you."

They asked a [farmer|baker|teacher], and they asked a [cat|dog|cow], but nobody knew.
So they asked everyone on the way, but everyone said no.
Together they went on and asked at every house.

Then they came {to_place}. There sat {owner} with a sad face.
At last they came {to_place} and saw {owner} who was crying.

"I lost my {adj_thing}," {she} said. "And it was a gift for my mother."
"What is wrong?" asked {name}. "My {thing} is gone," {she} said.

"Is it this one?" asked {name} and held out {the_thing}.
"Look what we have here!" said {name} and gave {her} {the_thing}.

---

"Yes, that is it!" {she} cried. "Thank you, thank you!"
{The_owner} laughed and cried at the same time. "You found it!" {she} said.
"My {thing}!" {she} called. "You are both so kind."

?
Then {the_owner} got in, and they all went for a ride together.
They sang a happy song, all three of them.
{?wheels}{Name} blinked with {his} lights for joy.

{Name} did not have the {thing} any more, but {his} heart was full.
It feels good to give back what is not yours.
Being honest is better than having {a_thing}.
<friends>
<home>
"""

ENGINE_PLOTS = (
    plot("on the way", ENGINES, _ON_THE_WAY, thing="any", place="any"),
    plot("blocked", ENGINES, _ERRAND + _BLOCKED + _ARRIVAL, thing="any", place="any"),
    plot("dropped", ENGINES, _ERRAND + _DROPPED + _ARRIVAL, thing="any", place="any"),
    plot("hill", WHEELS, _HILL, place="any"),
    plot("bump", ENGINES, _BUMP, place="any"),
)
