"""Plots about home and school: a contest, the truth, a first day, a tidy room, a box, a new baby."""

from __future__ import annotations

from bench.guide.story_grammar import plot
from bench.guide.story_words import WALKERS

FAMILY = frozenset({"animal", "child"})

_CONTEST = """
@contest, work, tool, result
painting ; paint a picture ; brush ; picture
singing ; sing a song ; song book ; song
baking ; bake a cake ; big spoon ; cake
kite ; build a kite ; string ; kite
@judge
mouse with glasses
old teacher
mayor
queen

?6
<open>

{One_day} there was a {contest} contest {in_place}, and {intro} wanted to win the prize, {a_thing}.
{Intro} heard about a {contest} contest {in_place}. The prize was {a_thing}!
{Intro} wanted to win the {contest} contest {in_place}, because the prize was {a_thing}.

?
"I must work hard," said {name}. {He} had to {work}, and {he} tried it many times.
{Name} practiced every day. {He} learned how to {work} better and better.
{He} wanted to {work}, and it had to be the best one of all.

---

When the day came, {name} was very excited and stood next to {a_friend}{fnamed}.
At last it was time, and next to {name} stood {a_friend}{fnamed}.
On the day of the contest {name} met {a_friend}{fnamed} who was in it too.

But {friend} was crying. "I forgot my {tool}," {fhe} said.
Then {friend} looked into {fhis} bag. "Oh no! My {tool} is at home!" {fhe} cried.
"Oh no, my {tool} is broken!" {friend} cried.

?
{Name} thought, "Without {friend} it will be easier to win." But that did not feel right.
{Name} looked at {his} own {tool}. {He} needed it too. What should {he} do?
At first {name} said nothing. But then {he} saw the tears of {friend}.

"You can use mine," said {name}. "We can share."
So {name} held out {his} own {tool}. "Take this one," {he} said.
"Do not cry," said {name}. "We will use mine together."

?
{Friend} was so glad. "You are kind, {call}," {fhe} said.
"Really? Thank you!" said {friend}, and {fhe} began at once.

---

Then the {judge} came, and it was very quiet.
At the end the {judge} stood up, and everybody listened.
When all were done, the {judge} walked up and down and thought for a long time.

"The best {result} is from {friend}," said the {judge}. {Name} was a little sad, but {he} clapped.
"{Friend} is the winner!" the {judge} said. {Name} had not won, but {he} was glad for {friend}.

But then {friend} said, "I could only do it because {name} helped me. The prize is for both of us!"
Then {friend} took {name} to the front. "{Name} helped me," {fhe} said. "We will share {the_thing}."
{Friend} came over with {the_thing}. "This is for you and me," {fhe} said. "We won together."

?
Everybody clapped for the two of them.
The {judge} smiled. "That is the best thing I saw today," said the {judge}.
{Name} and {friend} held {the_thing} up high, and everybody shouted, "Hooray!"

It is good to win, but it is better to share.
{Name} was {happy}. {He} had not come first, but {he} had found a friend.
<friends>
<home>
"""

_LIE = """
@excuse
The wind did it
A big bird did it
It fell down by itself
Somebody bumped into me

?4
<open>

{One_day} {intro} and {his} friend {pal} were {in_place}. {Friend} had {a_thing}, and {name} wanted to hold it.
{One_day} {intro} saw {his} friend {pal} {in_place}. {Friend} had {a_thing}, and {name} wanted to have it for a while.
{One_day} {intro} met {his} friend {pal} {in_place}. {Friend} had {a_thing} that {name} liked very much.

"You can have it for a minute," said {friend}, "but please be careful."
"You may hold it," said {friend}, "but do not run with it."
"It is my best {thing}," said {friend} and gave it to {him}. "Take good care of it."

But {name} was so excited that {he} was not careful. Crack! {The_thing} fell down and broke.
But {name} began to run, and {he} fell over a stone. {The_thing} was broken!
But {name} forgot that and danced around with it, until it fell on the ground. It was broken!

---

"Who broke my {thing}?" asked {friend} and began to cry.
When {friend} saw it, {fhe} was very sad. "What happened to my {thing}?" {fhe} asked.

"{Excuse}," said {name}. But that was a lie.
{Name} was afraid. "{Excuse}," {he} said, but it was not true.
"{Excuse}," {name} said very fast and looked at the ground. It was a lie.

?
{Friend} believed {him}, and that made it even worse.
"Oh," said {friend} in a sad voice and went home.
{Friend} just picked up the pieces and went away.

After that, {name} could not eat, and at night {he} could not sleep.
{Name} did not want to play any more. The lie was like a stone in {his} belly.
All day long {name} thought about the lie, and it would not go away.

---

The next morning {he} {ran} to {friend}. "I lied," {he} said. "I broke your {thing}, and I am so sorry."
Then {name} went to {friend} and said, "It was me, and I lied. I am sorry."
At last {name} went to {friend}. "I must tell you the truth," {he} said. "I broke it, and I am sorry."

"I am sad about it," said {friend}, "but I am glad that you told me the truth."
"It was brave to tell me," said {friend}. "I forgive you."
"The truth is more important than a {thing}," said {friend}. "I forgive you."

?
Then they sat down together and mended {the_thing} with glue.
"I will help you to mend it," said {name}. And they did it, piece by piece.
Together they mended it, and soon it was almost as good as new.

{Name} felt light and happy again, and {he} never told a lie after that.
The truth can be hard to say, but it makes the heart light.
That night {name} slept well again.
<friends>
"""

_SCHOOL = """
?8
<open>

It was the first day of school for {intro}. {He} was excited and a little afraid too.
Today {intro} had to go to school for the first time.
{Intro} was big enough to go to school now. But {he} was not sure that {he} wanted to.

"What if nobody likes me?" {he} asked {his} mother.
"I want to stay at home with you," {he} told {his} mother.
{He} held on to {his} mother and did not let go. "What if I do not know anything?" {he} asked.

"You will see, it will be nice," said {his} mother. She gave {him} a kiss.
{His} mother smiled. "Everybody is a little afraid on the first day," she said.
"Just be kind," said {his} mother, "and you will find a friend."

---

At the school there were many others, and it was very loud.
In the school everything was big and new.
{Name} came into a big room and did not know where to sit.

Then {he} saw {a_friend}{fnamed} in the last row. {Fhe} was all alone and looked afraid.
Next to the window sat {a_friend}{fnamed}. {Fhe} was almost crying.
In the corner stood {a_friend}{fnamed}. {Fhe} did not say a word.

"May I sit next to you?" asked {name}. {Friend} nodded.
{Name} went over and said, "It is my first day. Is it your first day too?" "Yes," said {friend}.
"Hello," said {name}. "I am a little afraid. And you?" "Me too," {friend} whispered.

?
So they sat side by side, and it was not so scary any more.
They looked at each other and smiled.
{Friend} moved over, and {name} sat down. Two is better than one.

---

The teacher sang a song with them and showed them how to write [the letter A|a name|the number one].
They sang, they counted to ten, and the teacher read a funny story.
They painted with big brushes. {Name} painted the sun, and {friend} painted a house.

?
When it was time to eat, {name} shared a [pear|cookie|sandwich] with {friend}.
In the break they ran and jumped and played with all the others.
Outside there was a big slide, and {name} and {friend} went down together.

?
And then the bell rang. "Is it over already?" asked {name}.
The day went by so fast! {Name} did not want to go home.
When {his} mother came, {name} had so much to tell.

"How was it?" asked {his} mother. "Wonderful!" said {name}. "I have a new friend!"
"Do you want to go again tomorrow?" {his} mother asked. "Yes, yes, yes!" {name} shouted.
"Mother, look! This is {friend}," said {name}. "We will sit together every day."

New things are only scary at first.
{Name} could hardly wait for the next day.
<friends>
<sleep>
"""

_TIDY = """
?7
<open>

{Intro} did not like to clean up. {His} room was full of things.
The room of {intro} was a big mess. There were things on the floor, on the bed and under the bed.
{Intro} liked to play, but {he} did not like to clean up after that.

?
"Please clean up your room," {he} was told. "Later," {name} always said.
"I will do it tomorrow," {he} said every day. But {he} never did.
"I do not need to clean up," {he} said. "I know where everything is."

{One_day} {his} friend {pal} came. "Can we play with your {adj_thing}?" {fhe} asked. But where was it?
{One_day} {his} friend {pal} came. "Can you show me your {adj_thing}?" {fhe} asked.
Then {one_day} {name} wanted to show {his} {adj_thing} to {his} friend {pal}.

---

{Name} looked under the bed and behind the chair. No {thing}!
{Name} looked here and there. {He} found one old sock and half a cookie, but no {thing}.
{Name} threw everything around. Now the mess was even bigger.

?
"It is gone!" {he} cried. "I will never find it in here."
{Name} sat down on the floor. "My {thing} is lost," {he} said, and {he} was {sad}.

"I know how to find it," said {friend}. "Put one thing after the other in its place."
"There is only one way," {friend} said. "We have to clean up."

{Name} did not like that, but there was no other way. So {he} began.
"All right," {name} said, and {he} got to work.

?
Books went on the shelf. Socks went into the drawer. Toys went into the box.
{He} picked up one thing, and then one more, and then one more.
They sang a song, and the work was almost fun.

---

And under the very last pile, what was there? {The_thing}!
And there, under an old coat, lay {the_thing}!
Soon {he} could see the floor again. And in the corner was {the_thing}!

?
{Name} also found a [ball|coin|drum] that {he} had lost a long time ago.
"Hooray!" cried {name}. "Now I have {the_thing}, and I have a nice room too."
{He} laughed. "It was here the whole time!"

?
Now there was so much room that they could dance in it.
"Now we have room to play," said {friend}. And so they did.
{Name} looked around. {He} liked how everything looked now.

After that, {name} put everything back in its place in the evening.
When every thing has a place, you can find every thing.
From then on {name} cleaned up a little every day, and nothing was ever lost again.
<sleep>
"""

_BOX = """
@ship, trip, sight, end
a big ship ; sailed over the sea ; a whale that sang a song ; back in the harbor
a rocket ; flew to the moon ; a moon mouse that ate cheese ; back on the ground
a train ; went through a long tunnel ; a land where it snowed in summer ; back at the station
a castle ; lived like a king and a queen ; a dragon that only wanted to play ; at home again
a plane ; flew over the hills ; a bird that told them jokes ; back on the ground

?7
<open>

{One_day} it rained and rained. {Intro} had to stay inside.
It was a gray and rainy day. {Intro} looked out of the window.
It rained all day long, and {intro} could not go out to play.

?
"I am so bored," {name} said. "There is nothing to do."
{Name} had played with all {his} toys, and now {he} was bored.
"When will the rain stop?" {he} asked. But the rain went on.

Then {his} friend {pal} came to visit. {Fhe} brought a big empty box.
There was a knock at the door. It was {his} friend {pal} with a very big box.
Then {his} friend {pal} came in with wet feet. "Look what I found," {fhe} said. It was a big box.

---

"It is only a box," said {name}. "Oh no," said {friend}, "it is {ship}!"
"What can we do with a box?" asked {name}. {Friend} laughed. "It can be anything! It can be {ship}."
They looked at the box for a while. "I know!" said {name}. "It is {ship}!"

?
They cut out a door, and they painted the box [red|blue|yellow].
They made a window and painted stars on it.
They painted it and put in two pillows to sit on.

?
"All in!" called {friend}. They climbed in, and the game began.
Then they sat down inside. "Are you ready?" asked {friend}. "Ready!" said {name}.
{Name} closed the door. "Hold on!" {he} shouted.

They {trip}, and on the way they saw {sight}.
In their game they {trip}. There was even {sight}!
They {trip}. "Look over there!" said {name}, and there was {sight}!

?
"Hello!" they called and waved.
They laughed so much that the box shook.
"This is the best trip of all," {friend} said.

---

In the evening they were {end}, tired and happy.
When it was time to stop, they were {end}. What a trip!
After a long, long time they were {end}.

?
"Look," said {name}, "the rain has stopped." They had not even seen it.
Outside the sun was shining, but they did not want to go out now.
"I hope it rains again tomorrow," said {name}, and they both laughed.

You do not need much to have fun. A box and a friend are enough.
They kept the box, and each time it was something new.
"A box is never only a box," said {friend}.
<friends>
<sleep>
"""

_SIBLING = """
@baby, she, her
little sister ; she ; her
little brother ; he ; him
@looks
small and red
very small and soft

?8
<open>

{One_day} {intro} got a {baby}. The baby was {looks}, and {she} cried a lot.
{Intro} was very excited. Today {his} {baby} came home!
In spring {intro} got a {baby}. Everybody came to see the baby.

But now nobody had time for {name}. The baby had to eat, and the baby had to sleep.
"Be quiet, the baby is sleeping," {name} was told all day long.
Everyone looked at the baby. Nobody looked at {name}.

?
"Can you play with me?" {name} asked. "Not now," said {his} mother. "The baby is hungry."
{Name} felt {sad}. "Nobody loves me any more," {he} thought.
{Name} sat down in a corner with {his} {adj_thing}. {He} was a little angry at the baby.

---

{One_day} the baby cried and cried. Nothing helped.
Then one evening the baby would not stop crying. Mother was very tired.
One night the baby cried so loud that nobody could sleep.

?
{Name} held {his} ears. But then {he} had an idea.
{Name} looked at the baby. "What is wrong with you?" {he} asked.
"May I try?" asked {name}.

{Name} took {his} {adj_thing} and showed it to the baby.
{Name} put {his} best {thing} next to the baby. "Look, this is my {adj_thing}," {he} said.
{Name} came closer with {his} {adj_thing} and sang a little song.

And the baby stopped crying and looked at {him} with big eyes.
The baby looked at {the_thing}. Then {she} looked at {name}, and then {she} smiled!
All at once it was quiet. The baby smiled for the very first time!

---

"{She} likes you," said {his} mother. "You are the best at this."
"{She} smiled at me!" said {name}. "Yes," said {his} mother, "because you are so kind to {her}."
{His} mother hugged {him}. "The baby is so lucky to have you," she said.

?
"We love you both just the same," said {his} father. "There is enough love for two."
"Do you still love me too?" asked {name}. "Of course we do!" said {his} mother. "More than ever."
Then {his} mother read a story, just for {name}.

?
Now {name} liked the baby. It was good not to be the smallest any more.
"When you are bigger," {name} told the baby, "I will show you how to play."
{Name} held the tiny hand of the baby and was {happy}.

Love does not get smaller when you share it. It gets bigger.
And when the baby could walk, {she} went everywhere {name} went.
From then on {name} sang for {his} {baby} every evening.
<sleep>
"""

HONEST_PLOTS = (
    plot("contest", WALKERS, _CONTEST, thing="any", place="any"),
    plot("lie", WALKERS, _LIE, thing="frail", place="any"),
    plot("first school day", FAMILY, _SCHOOL, place="school"),
    plot("tidy room", WALKERS, _TIDY, thing="made"),
    plot("box", WALKERS, _BOX),
    plot("new baby", FAMILY, _SIBLING, thing="made"),
)
