"""Plots about a cloud, a star or a plane."""

from __future__ import annotations

from bench.guide.story_grammar import plot

SKY = frozenset({"sky"})
CHILD = """
@child, short, she, her, hers
{!female}a little girl ; the girl ; she ; her ; her
{!male}a little boy ; the boy ; he ; him ; his
{!male}a young rabbit ; the rabbit ; he ; him ; his
{!female}a small bear ; the bear ; she ; her ; her
"""

_RAIN = """
@who
the flowers
the trees
the little frogs
the birds

?8
<open>

It had not rained for a long time. {At_place} everything was dry.
{One_day} {intro} floated over {place}. Everything was brown and dry.
{One_day} {intro} looked down. {At_place} there had been no rain for weeks.

"We are so thirsty," said {who}. "Please, can you help us?"
"Water, water!" {who} called. "Please give us some water!"
{Who} looked up at {name}. "Please give us rain," they said.

{Name} wanted to help, but {he} was much too small. Only one drop fell.
{Name} squeezed and squeezed, but there was only one drop.
"I have no rain in me," {name} said. {He} was very sad.

---

?
{Name} thought about it. "I will find some water," {he} said.
"I will be back soon," {name} said. "Do not give up!"
But {name} did not give up. {He} had an idea.

So {he} floated to the big sea and drank and drank. {He} grew big and gray.
{He} asked the wind, and the wind took {him} to the sea. There {he} drank until {he} was full.
{He} flew all the way to the sea. {He} drank so much that {he} was as round as a ball.

?
On the way back {he} met other clouds. "Come with me!" {he} called. "I need your help!"
Now {he} was very heavy, and the way back was long. But {he} thought of {who} and went on.
The sun was hot, and {he} was tired. But {he} did not stop.

At last {he} was back over {place}. "Are you ready?" {he} called.
Then {he} saw {place} again. "Here I am!" {he} called.

---

Plip, plop, plip, plop! It rained and rained.
And then the rain came down, soft and warm.

?
{Who} danced and sang. "Thank you, {call}!"
"Hooray!" shouted {who}. They drank and drank.

The next day everything was green again.
Soon there was green grass, and the flowers opened.
Children came out and jumped in the puddles.

?
{Name} was small and white again, but {he} was very happy.
{Name} was empty now, but {his} heart was full.
Then a rainbow came out, and {name} sat down on top of it to rest.

Even a small cloud can do a big thing.
From then on {name} came back every week.
And when it got dry again, {name} knew what to do.
That night {name} slept well, high above {place}.
"""

_ABOVE = (
    CHILD
    + """
@spot
{?green}in the top of a tree
{?green}in the tall grass
{?out}on a high wall
{?out}behind a big stone
{?in}on the roof
{?in}behind the house
{?in}next to the steps

?8
<open>

{One_day} {intro} was {in_place}. Down below, {child} was crying.
{One_day} {intro} looked down and saw {child} {at_place}. {She} looked very sad.
Every day {intro} looked down at {place}. {One_day} {he} saw {child} who was crying.

?
"Why are you crying?" {name} called down.
{Name} came a little lower. "What is wrong?" {he} asked.
"Can I help you?" {name} asked softly.

"I lost my {adj_thing}," said {short}. "I looked everywhere, and I cannot find it."
{Short} looked up. "My {adj_thing} is gone," {she} said. "It was a gift from my grandmother."
"I had {a_thing}," {short} said, "and now it is not there any more."

---

"From up here I can see everything," said {name}. "I will look for it."
"I can see very far from here," {name} said. "Do not cry. I will find it."
{Name} wanted to help. "You look down there," {he} said, "and I will look from up here."

?
{He} looked to the north and to the south. {He} saw roofs and trees, but no {thing}.
First {he} saw something shiny, but it was only a puddle.
{He} looked here and there. It was not easy, because everything was so small from above.

?
{Short} looked under every leaf and behind every door.
"Can you see it?" {short} called. "Not yet," said {name}, "but I am still looking."

Then {name} saw it. It lay {spot}!
And there it was, {spot}! "I see it!" called {name}.

"Go to the left, then go on a little more," {name} said. "Stop! It is {spot}!"
{Name} flew right over it, so that {short} could see where it was. "Come this way!" {he} called.
"Follow me!" {name} called, and {he} went ahead until {he} was right above it.

---

{Short} found it and held it up high. "Here it is! Thank you!" {she} cried.
{Short} ran there and picked it up. "My {thing}!" {she} shouted and danced.

?
"You are the best {kind} in the whole sky," said {short}.
"How can I thank you?" asked {short}. "Just wave when you see me," said {name}.
"I will never forget you," {short} said and blew {him} a kiss.

After that, {short} waved at {name} every day, and {name} was {happy}.
From then on {short} and {name} said good night to each other every evening.
{Name} felt proud. It is good to see far, but it is better to help.
And {short} never lost {the_thing} again.
They were friends from then on, one up in the sky and one down below.
"""
)

_GUIDE = (
    CHILD
    + """
@dark, light
{?star}It was a very dark night ; {Name} shone as bright as {he} could
{?plane}The way was long, and at last it got dark ; {Name} turned on {his} brightest light
{?cloud}Soon there was thick fog ; {Name} went ahead like a white flag
@elder_one
grandmother
grandfather
aunt
uncle

?8
<open>

{One_day} {intro} looked down from the sky and saw {child} on the way {to_place}.
{One_day} {intro} saw {child} down on a long road. {She} wanted to go {to_place}.

{She} had {a_thing} in a little bag, a gift for {hers} {elder_one}.
"I bring {a_thing} to my {elder_one}," {she} told a bird.

{Dark}, and {short} did not know which road was the right one.
{Dark}, and {short} could not see the way any more.

?
"Where do I have to go?" {short} asked. Nobody answered.
"I am lost," said {short}, and {she} held {hers} bag tight.
{She} sat down on a stone and began to cry.

---

?
{Name} heard {her} and wanted to help. "But I am so small and so far away," {he} thought.
{Name} felt sorry for {her}. "I must do something," {he} said.

"Do not be afraid!" {name} called. "I will show you the way!"
"Look up!" called {name}. "You only have to follow me!"

{Light}, and {short} looked up and dried {hers} eyes.
{Light}. "I can see you!" said {short}.

So {short} followed {name}, over a bridge and up a hill.
Slowly they went on, {name} up in the sky and {short} down on the road.
{She} went on and on, and {name} was always in front of {her}.

?
When {short} was tired, {name} waited for {her}.
{Short} sang a little song, and {name} liked it very much.

---

At last {short} saw a light in a window, and they were there!
And then they were there, and {short} could see {place} in front of {her}.

The door opened. "There you are!" said {hers} {elder_one} and hugged {her}.
{Hers} {elder_one} was already waiting. "How good that you found the way!"
{Short} gave {the_thing} to {hers} {elder_one} who was very happy.

?
"I had a friend who showed me the way," said {short}. {She} waved up at the sky.
"Thank you, {call}!" {short} called. "You brought me here."

{Name} was so happy that {he} danced in the sky.
Even somebody small and far away can help.
From then on {short} looked up every evening and said, "Good night, my friend."
{Name} was tired but very proud.
And so {the_thing} came to the right place after all.
"""
)

_LONELY = """
<open>

{Name} was alone. Far below there was {place}, and there was always somebody to talk to.
{Name} looked down at {place} every day. There everybody played and laughed together.
From up there {name} could see {place}. All were together down there, and only {name} was alone.

?
"I wish I had a friend," {name} said.
"Nobody ever talks to me," said {name}, and {he} was {sad}.
It was so quiet up there that {name} told stories to {himself}.

?
{He} called down to them, but it was too far away, and nobody heard {him}.
{He} called and waved, but nobody looked up.
{He} tried to sing very loud, but the wind blew the song away.

---

Then {one_day} {a_friend}{fnamed} came flying by.
But {one_day} {name} saw something in the sky. It was {a_friend}{fnamed}!
Then {one_day} something came closer and closer. It was {a_friend}{fnamed}.

"Hello!" called {name}. "Please stay and play with me!"
{Name} was shy at first, but then {he} called, "Hello! Do you want to play with me?"
"Hello!" called {name}. "Can you stay with me for a while?"

"Yes!" said {friend}. "I thought that I was the only one up here."
"I would love to do that," {friend} said and stopped.
{Friend} stopped. "Yes! How nice to meet you!" {fhe} said.

They played hide and seek and looked at the world from above.
They raced with the wind and laughed out loud.
They danced around each other, up and down, left and right.

?
{Name} showed {friend} {place} from above. "How small everything is!" {friend} said.
"Do you see {place} down there?" asked {name}. "It looks like a toy," said {friend}.

---

Then it got late, and {friend} had to go home. "Will you come back?" asked {name}. "I promise," {friend} said.
In the evening {friend} had to go. "Do not forget me," said {name}. "Never," said {friend}.

The next day {name} waited, and there {fhe} was!
And {friend} kept {fhis} word. {Fhe} came back the next day and every day after that.
{!star}And the next morning {friend} was really there again.

Now {name} was not alone any more. {He} was the happiest {kind} in the sky.
The sky is big, but with a friend it is just right.
Sometimes you only have to say hello to find a friend.
<friends>
"""

_PICTURE = (
    CHILD
    + """
@first, second
a sheep ; a boat
a fish ; a big shoe
a snail ; a funny hat
a horse ; a teapot

?8
<open>

{One_day} {intro} was {in_place}. Down there {child} lay on {hers} back and looked {sad}.
{One_day} {intro} looked down and saw {child} {at_place} who did not play and did not laugh.

"Why is {she} so sad?" {name} asked the wind. "{She} has nobody to play with today," said the wind.
"What is wrong?" {name} asked a bird. "{Hers} {adj_thing} is broken," said the bird. "That is why {she} is so sad."

?
{Name} wanted to make {her} laugh. But how?
"I want to do something for {her}," said {name}. "But what can a cloud do?"
"I am only a cloud," {name} thought. "How can I make {her} happy?"

---

Then {he} had an idea. {He} pulled and pushed, and soon {he} looked like {first}.
{He} puffed and stretched until {he} looked like {first}.

{Short} looked up. "Look, {first}!" {she} said and smiled a little.
{Short} opened {hers} eyes wide. "That cloud looks like {first}!" {she} said.
"Look at that!" called {short}. "The cloud looks like {first}!"

?
Then {name} turned around and was {second}. "And now it is {second}!" {short} laughed.
That was fun! Now {name} made {himself} long and then round, until {he} was {second}.

"What would you like to see?" asked {name}. "Can you be a {thing}?" asked {short}.
"Can you make a {thing} too?" {short} called. "I love that most of all."

?
That was hard, but {name} tried and tried.
{Name} had never done that before, but the wind helped {him} a little.
"I will try," said {name}. {He} worked very hard.

And there it was, a soft white {thing}, high in the blue sky!
Then it worked. A big white {thing} floated in the sky!

---

{Short} jumped up and clapped. "You are wonderful!" {she} shouted.
{Short} laughed so loud that even the birds looked up.

?
Others heard it and came too. They all lay down in the grass and said what they could see.
They played this game until the sun went down.
"Again, again!" called {short}. And {name} did it again and again.

?
In the evening the wind took {name} away. "I will come back!" {he} called.
"Thank you, {call}!" {short} said and waved. {She} was not sad any more.

After that, {short} looked up at the sky every day, and sometimes {name} was there.
It is easy to make somebody happy when you try.
And {name} slept well that night, because {he} had made somebody laugh.
A little cloud had made a sad day bright.
"""
)

_HEARD_WISH = (
    CHILD
    + """
@maker, he_made
the old teacher ; she
the gardener ; he
the baker ; she
the painter ; he

?8
<open>

{One_day} {intro} heard a small voice {at_place}. "I wish I had {a_thing}," it said.
{One_day} {intro} was {in_place}. "I wish for {a_thing}," somebody said down there.
{One_day} somebody looked up at {intro}. "Please, I wish for {a_thing}," came a voice from {place}.

It was {child}. {She} wanted to give it to {hers} sick sister.
It was {child} who needed it for {hers} mother's birthday.
It was {child}, and {she} had never had one before.

{Name} wanted to help, but how? "I have no {thing} up here," {he} said.
"I would like to make the wish come true," said {name}, "but I am only {a_kind}."
{Name} looked all over the sky, but there was no {thing} up there.

---

Then {name} looked down into the house of {maker} and saw {a_thing} that nobody used.
But {he} could see far. In the house of {maker} there was {a_thing} that nobody used.
{Name} looked and looked. And there, in the house of {maker}, was {a_thing}!

"Hello!" {name} called to {maker}. "Could you give your {thing} away?"
So {name} told {maker} about the wish.
{Name} came down low and told {maker} about {short}.

"Of course I can," {he_made} said. "I do not need it any more."
"I am so happy to help," {he_made} said. "I only have to clean it a little."
"What a good idea," {he_made} said and put it in a bag at once.

?
"But I do not know the way," {he_made} said. So {name} went ahead and showed it.
{Name} could hardly wait.
{Name} was so glad that {he} turned around three times.

---

The next day there was a knock at the door. {Short} opened it, and there was {the_thing}!
In the morning {short} found a bag at the door. {The_thing} was in it!
Soon {maker} stood {at_place} and held out {the_thing}. "This is for you," {he_made} said to {short}.

"My wish came true!" {short} shouted and jumped for joy.
{Short} was so happy that {she} danced. "It is just what I wished for!" {she} said.

?
Then {she} looked up at the sky and waved. "Was it you, {call}?"
"Somebody up there told me," said {maker}.

{Name} smiled high up in the sky and said nothing.
You do not need to have much to help somebody. You only have to listen.
And {name} listened to all the wishes after that.
From then on {short} said good night to {name} every evening.
"""
)

SKY_PLOTS = (
    plot("heard wish", SKY, _HEARD_WISH, thing="made", place="any"),
    plot("rain", frozenset({"cloud"}), _RAIN, place="green"),
    plot("from above", SKY, _ABOVE, thing="keep", place="any"),
    plot("guide", SKY, _GUIDE, thing="any", place="any"),
    plot("lonely", SKY, _LONELY, place="any"),
    plot("picture", frozenset({"cloud"}), _PICTURE, thing="any", place="out"),
)
