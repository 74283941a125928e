"""Plots about making and mending, and about days that turn out well."""

from __future__ import annotations

from bench.guide.story_grammar import plot
from bench.guide.story_words import WALKERS

_BUILD = """
@what, the_what, parts, fall, use
a little house ; the little house ; branches and leaves ; the roof fell in ; They sat inside and drank apple juice
a bridge over the stream ; the bridge ; wood and rope ; it fell into the water ; They walked over it and back again
a raft ; the raft ; logs and rope ; it came apart in the water ; They sat on it and went down the stream
a swing ; the swing ; wood and rope ; it came down with a bump ; They went up and down, high into the air
a tower ; the tower ; flat stones ; it all fell down ; They put a flag on top of it

?7
<open>

{One_day} {intro} was {in_place} and had an idea. "I want to build {what}!" {he} said.
{One_day} {intro} went {to_place} to build {what}.
"I will build {what} {in_place}," said {intro} {one_day}.

{His} friend {pal} wanted to help. "No, I can do it alone," said {name}.
{His} friend {pal} asked, "Can I help?" But {name} wanted to do it all alone.
"I can help you," said {his} friend {pal}, but {name} did not want any help.

So {he} got {parts} and worked all morning.
{He} carried {parts} and worked very hard.
{He} took {parts} and began.

But then there was a loud noise, and {fall}!
It looked good for a minute, but then {fall}.
When it was almost done, {fall}.

---

?
{Name} sat down and wanted to cry. "All that work for nothing," {he} said.
"It does not work!" {name} shouted and kicked a stone.
{Name} was tired and {sad}.

Then {friend} came back. "Shall we try it together?" {fhe} asked.
{Friend} did not laugh at {him}. "Shall I help you now?" {fhe} asked.
{Friend} sat down next to {him}. "Do you need some help?" {fhe} asked.

"Yes, please," {name} said softly. "I am sorry that I sent you away."
"Yes, I was silly," said {name}. "Please help me."
"Yes, please," said {name}. "Two can do more than one."

---

So they began again, and now everything was easier.
{Friend} held everything, and {name} put it together.
{Friend} had good ideas, and {name} had good ideas too.

?
Step by step, it grew. They sang while they worked.
It went much faster now, and it was more fun.
They worked until the sun was low in the sky.

In the evening {the_what} was ready, and it did not fall down.
Then they were done, and {the_what} was big and strong.
And then it was ready! They both stood back and looked at it.

{Use}.
They tried it at once. {Use}.
"Let us try it!" said {friend}. {Use}.

"We built this together," {name} said to everyone who came by.
Two who work together can do big things.
"Next time I will ask you first," said {name}.
<friends>
<home>
"""

_BIRTHDAY = """
?6
<open>

It was the birthday of {intro}. {He} got up early and was very excited.
"Today is my birthday!" said {intro} when the sun came up.
{Intro} had waited for this day for a long time. It was {his} birthday!

?
But nobody said a word about it. {He} waited and waited.
But when {he} came out, nobody was there. It was very quiet.
{He} looked for a cake, but there was no cake.

{He} met {his} friend {pal}. "I have no time today," said {friend} and hurried away.
Then {his} friend {pal} came by. "Do you know what day it is?" asked {name}. "Yes, it is washing day," said {friend}.
{He} went to {his} friend {pal}. "I am very busy today," {friend} said and closed the door.

{Name} was {sad}. "They all forgot my birthday," {he} thought.
"Nobody remembers me," said {name}, and a tear ran down {his} face.
{Name} sat down all alone. This was not a happy birthday.

---

In the afternoon somebody knocked. There was a note. It said, "Come {to_place}!"
Later {he} found a paper on the floor. It said, "Please come {to_place} at four."
Then {name} heard a voice. "Come {to_place}, quick! I need your help!" it called.

{Name} {ran} there as fast as {he} could. What could it be?
So {name} went there, but everything was quiet.
{Name} did not know what to think, but {he} went.

"Surprise!" All {his} friends jumped out and shouted, "Happy birthday, {call}!"
All at once everybody jumped up. "Surprise! Happy birthday!" they shouted.
Then {he} heard, "One, two, three, surprise!" And there they were, all of them.

?
{In_place} there were balloons and candles and a big cake.
There was music, and there was a cake with many candles.
Everything was full of flowers, and there was a cake as big as a hat.

---

"We did not forget you," {friend} said and gave {him} a box with a bow. In it was {a_thing}.
{Friend} came with a gift. "This is from all of us," {fhe} said. It was {a_thing}!
"This is for you," said {friend}. {Name} opened the box and found {a_thing}.

?
"I thought you had no time for me!" said {name}. {Friend} laughed. "We had to get everything ready."
"That is why you were so busy!" said {name} and laughed.
"It was so hard not to tell you!" {friend} said.

?
"It is just what I wanted!" said {name}. {He} hugged every one of them.
{Name} held {the_thing} and did not know what to say. {He} was so happy.
{Name} laughed and cried at the same time. "Thank you all!" {he} said.

?
They danced and ate cake until the stars came out.
Then they all ate cake, and there was enough for everybody.
{Name} blew out the candles and made a wish.

It was the best birthday {name} had ever had.
{Name} liked the {thing}, but the best gift of all was {his} friends.
"My friends are the best," {name} thought that night and fell asleep.
<sleep>
"""

_MEND = """
?6
<open>

{Intro} loved {his} {adj_thing}. {One_day} {he} took it {to_place}.
{Intro} had {a_thing}. {One_day} {he} went {to_place} with it.
{One_day} {intro} was {in_place} with {a_thing} that {he} loved very much.

Then {he} fell over a stone, and {the_thing} broke.
But {he} slipped and fell, and {the_thing} was broken.
But {he} was in a hurry and fell down. Crack! {The_thing} was in two pieces.

?
"Oh no, my {thing}!" cried {name}.
{Name} picked up the pieces. {He} was {sad}.
{Name} sat down and cried. {He} held the broken {thing} close.

?
"You can get a new one," somebody said. But {name} did not want a new one.
"Throw it away," said a crow. But {name} could never do that.
"I do not want another one," {he} said. "I want this one."

---

{His} friend {pal} saw {him}. "I know someone who can mend things," {fhe} said.
Then {his} friend {pal} came. "Do not cry, {call}," {fhe} said. "There is a man who can mend everything."
"Come with me, {call}," said {his} friend {pal}. "I know a man who can mend it."

They went to an old man with a white beard. His shop was full of clocks and toys.
So they went to a little shop. There sat an old man with big glasses.
In a small shop they found an old man with a lot of tools.

"Can you mend it?" {name} asked. "Yes, I can," said the old man, "but you have to help me."
"Please, can you help me?" asked {name}. "Let us do it together," the old man said.
"Can this be mended?" {name} asked. The old man nodded. "I will show you how."

{Name} held the light, and the old man used glue and a tiny brush.
So {name} held the pieces, and the old man put them together.
They worked slowly, and {name} was very careful.

---

?
Then they had to wait until it was dry. They drank tea and told stories.
It took a long time, but {name} did not mind.
"Now we must wait," said the old man. {Friend} told a joke, and they all laughed.

"There," the old man said at last. {The_thing} was whole again!
At last it was ready, and it was as good as new!
And then {the_thing} was mended. There was only a thin line.

?
"Thank you!" {name} cried and hugged the old man.
"What can I give you?" asked {name}. "Just come and visit me," said the old man.
{Name} danced around the shop. "You are the best!" {he} told the old man.

Now {name} loved {the_thing} even more than before.
After that, {name} often went to the shop and learned to mend things too.
What is broken can often be made whole again.
<friends>
<home>
"""

_PICNIC = """
?6
<open>

{One_day} {intro} and {his} friend {pal} wanted to have a picnic {in_place}. They had {a_thing} in a bag.
"Let us have a picnic {in_place}," {intro} said to {his} friend {pal}. They packed {a_thing} and a blanket.
{One_day} {intro} and {his} friend {pal} went {to_place}. In their bag they had {a_thing} for a picnic.

?
They put the blanket on the ground and sat down.
They found a nice spot and sat down in the sun.
The sun was warm, and everything was ready.

But then it began to rain. Plip, plop, plip, plop!
Then a big drop fell on {name}. Then there was one more, and one more. It was raining!
Just then a dark cloud came, and the rain fell down on them.

---

"Oh no, our picnic!" cried {friend}. They put everything back into the bag and ran home.
"Quick!" said {name}. They took the bag and ran home through the rain.
They picked up everything and ran home.

?
"Now the day is over," {friend} said in a sad voice.
{Friend} was {sad}. "I wanted to have a picnic so much," {fhe} said.
They looked out of the window. It rained and rained. "What a bad day," said {friend}.

?
{Name} thought about it for a while. Then {he} smiled.
{Name} did not like to see {friend} so sad. Then {he} had an idea.
But {name} said, "Wait! I have an idea."

"We can have our picnic here," said {name} and put a blanket on the floor.
{Name} put a blanket under the table. "This is our picnic spot," {he} said.
"Who says that a picnic has to be outside?" asked {name} and made a tent from chairs.

---

?
{Friend} began to smile. {Fhe} picked up some paper and made a yellow sun for the wall.
"That is a wonderful idea!" said {friend}. {Fhe} put flowers all around.
{Friend} laughed and put on a sun hat. "It is so hot today," {fhe} joked.

Then they ate the {thing}. It was so good!
They cut the {thing} in two and ate it all up.
They shared the {thing} and drank milk with it.

?
They sang, and the rain on the roof played the drum for them.
They made funny bird sounds, and it was almost like being {in_place}.
Outside it was wet and gray, but inside it was warm and bright.

?
"This is the best picnic ever!" said {friend}.
"I like rainy days now," {friend} said.
"Thank you, {call}," {friend} said. "You made the sun shine inside."

With a good idea you can have fun in any weather.
It does not matter where you are when you are with a friend.
The next day the sun was back, and they went {to_place} again.
<friends>
<sleep>
"""

MAKING_PLOTS = (
    plot("build", WALKERS, _BUILD, place="wild"),
    plot("birthday", WALKERS, _BIRTHDAY, thing="any", place="any"),
    plot("mend", WALKERS, _MEND, thing="frail", place="any"),
    plot("picnic", WALKERS, _PICNIC, thing="food", place="out"),
)
