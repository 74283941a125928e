"""Plots about what is lost, found, mixed up or looked for."""

from __future__ import annotations

from bench.guide.story_grammar import plot
from bench.guide.story_words import WALKERS

_LOST = """
@spot
{?green}under a bush
{?green}in the tall grass
{?out}behind a big stone
{?out}under a bench
{?sand}under the sand
{?in}behind the door
{?in}under a bench
{?in}behind a big box
{?in}in a dark corner

?7
<open>

{Intro} had {a_thing}, and {he} took it everywhere.
{Intro} had {a_thing}. It was the best [gift|present] {he} had ever had.
{Intro} had {a_thing} and loved it very much.
More than anything, {intro} loved {a_thing} that {he} had found long ago.
{Intro} had many [nice|pretty] things, but the best one was {a_thing}.

{One_day} {he} went {to_place} and took {the_thing} along.
{One_day} {name} took it {to_place}.
{One_day} {name} and {the_thing} were {in_place} [all day|for a long time].
{One_day} {he} went {to_place}, and of course {the_thing} came too.

But when it was time to go home, {the_thing} was gone.
Then {name} put it down to look at a bird, and soon {he} did not know where it was.
{Name} played and played. Then {he} looked around, and {the_thing} was gone!
But then {he} started to run and jump, and {the_thing} fell down somewhere.

?
"Oh no!" {name} cried. "Where is my {thing}?"
"My {thing} is gone!" {name} cried. "What can I do?"
"Oh no, I have lost my {thing}!" said {name}.
{Name} felt {sad}. A tear ran down {his} face.

---

Just then {a_friend}{fnamed} came by. "Why are you so sad?" {fhe} asked.
{A_friend}{fnamed} heard {him} and came over. "What is wrong?" {fhe} asked.
Then {a_friend}{fnamed} came along and saw {his} sad face. "Can I help you?" {fhe} asked.
Soon {a_friend}{fnamed} came by and asked, "What are you looking for?"

"I lost my {adj_thing}," {name} said. "[I cannot find it|I looked everywhere]."
"I am looking for my {adj_thing}," said {name}. "It was here, and now it is gone."
{Name} told {fhim} about the lost {thing}.

"Do not be sad," said {friend}. "We will look together."
"Four eyes see more than two," said {friend}. "Let us look for it."
"I will help you," said {friend}. "I am good at finding things."

?
First they looked [here and there|up and down], but they did not find it.
They looked to the left and to the right. It was not there.
They looked and looked. They found a [button|coin|nut], but no {thing}.
They looked in [three|four|five] places, but {the_thing} was in none of them.

Then {friend} looked {spot}. "Here it is!" {fhe} [called|shouted].
At last {friend} saw something {spot}. It was {the_thing}!
Then {name} looked {spot}, and there it was! It was a little dirty, but that was all.
"Wait," said {friend}, "what is that {spot}?" And there lay {the_thing}!

---

{Name} [held|hugged] it and jumped for joy. "Thank you, {fcall}!" {he} said.
"You found my {thing}!" {name} laughed. "You are a true friend."
{Name} was {happy}. "I could not have done it without you," {he} told {friend}.
"Hooray!" cried {name}. {He} gave {friend} a big hug.

?7
After that, {name} always took good care of {the_thing}.
{Friend} laughed too, and they played until [evening|the sun went down].
From then on {name} always put it in a safe place.

<friends>
<home>
<sleep>
It is easy to find things when a friend helps you look.
And the {thing} was never lost again.
"""

_FOUND = """
@spot
{?green}under a bush
{?green}in the grass
{?out}next to a big stone
{?out}on a bench
{?in}on a bench
{?in}next to the door
{?in}on the floor
@helper, where
baker ; by the gate
teacher ; under the big clock
farmer ; by the old well
gardener ; on the white bench
painter ; at the corner

?5
<open>

{One_day} {intro} was {in_place} and saw {a_thing} {spot}.
{One_day} {intro} went {to_place} all alone. There {he} saw {a_thing} {spot}.
{One_day} {intro} was {in_place} and saw something {spot}. It was {a_thing}!
{One_day} {intro} went {to_place} and found {a_thing} {spot}.

"What a nice {thing}!" {he} said. "I would like to keep it."
{Name} picked it up and smiled, because {he} had always wanted [one like that|such a {thing}].
It was the best {thing} that {name} had ever seen, and {he} wanted to keep it.
{Name} held it up and wanted to keep it. How [nice|pretty] it was!

But then {name} thought, "Someone must miss this {thing}."
But {name} knew that it was not {his}, and that somebody had lost it.
"But it is not mine," {name} thought. "Someone must be looking for it."
Then {he} thought of how sad it is to lose something you love.

---

So {name} went to the {helper}. "Is this your {thing}?" {he} asked.
So {name} took it to the {helper} and asked, "Did you lose this {thing}?"
First {name} asked the {helper}, "Do you know whose {thing} this is?"

"No," said the {helper}, "but someone is crying {where}."
"Not mine," said the {helper}. "But I heard somebody cry {where}."
"It is not mine," the {helper} said. "But I saw somebody {where} who looked very sad."

{Name} thanked the {helper} and went there. {A_friend}{fnamed} sat {where} and cried.
So {name} went on, and there, {where}, sat {a_friend}{fnamed} with tears in {fhis} eyes.
{Name} {ran} as fast as {he} could, and there {he} saw {a_friend}{fnamed} with a very sad face.

"Did you lose something?" asked {name}. "Yes," {friend} said, "I lost my {adj_thing}."
"What is wrong?" {name} asked. "I lost my {adj_thing}," said {friend}. "It was a gift."
"Why do you cry?" asked {name}. "Because my {adj_thing} is gone," {friend} said.

{Name} held out {the_thing}. "Is it this one?" {he} asked. "Yes, it is!" cried {friend}.
"Then this is for you," said {name} and gave {fhim} {the_thing}.
"Look what I have here!" said {name}. And {he} gave {the_thing} back.

---

?
{Friend} jumped up and down. "Thank you, {call}! You are so kind!"
{Friend} was so happy that {fhe} gave {name} a big hug.
{Friend} laughed and danced with {the_thing}. "You made me happy again!" {fhe} said.
"Thank you, thank you!" {friend} shouted. "Do you want to play with me?"

?8
{Name} was happy too. Giving it back felt better than keeping it.
Now {name} had no {thing}, but {he} had a new friend.
{Name} smiled. It felt good to do the right thing.
{Name} felt warm inside, because {he} had been honest.

<friends>
<home>
<sleep>
{Name} was glad that {he} had not kept what was not {his}.
"""

_WAY_HOME = """
@lure
a blue butterfly
a red bird
a yellow leaf in the wind
a funny green bug
a big soap bubble
@path, sign
the little stream ; It runs right past your house
the white stones ; They lie all along the way
the old stone wall ; It ends near your house
the sound of the bell ; It rings in the tower next to your house
the smell of fresh bread ; It comes from the kitchen in your house

?7
<open>

{One_day} {intro} went {to_place} and saw {lure}.
{One_day} {intro} played {in_place}. Then {lure} came by.
{One_day} {intro} was on the way {to_place} when {he} saw {lure}.
{One_day} {intro} saw {lure} {in_place}.

It was so pretty that {he} {ran} after it, on and on.
"How pretty! Wait for me!" {he} called, and {he} {ran} after it.
{He} {ran} after it, over a little hill and around a big rock.
"I want to see where it goes," {he} said and went after it.

When it was gone, {name} looked around and did not know where {he} was.
Then it was gone, and nothing looked right to {name}. {He} did not know this place.
After a long time {name} stopped, and all at once {he} did not know the way home.
Then {name} saw that {he} had gone too far. {He} was lost!

?
"Where is my house?" {he} asked, but nobody answered.
{He} looked left and right. "I want to go home," {he} said in a small voice.
{He} felt small and a little afraid.
{Name} sat down and cried a little.

---

?
Then {name} took a deep breath. "I must stay calm and ask for help," {he} said.
But {name} did not cry for long. {He} dried {his} eyes and went to find help.
"Crying will not help me," {name} thought. "I will ask somebody."

Soon {he} met {a_elder}. "Excuse me, can you help me?" {he} asked. "I am lost."
{A_elder} came by. "Please, do you know the way to my house?" {name} asked.
Then {he} saw {a_elder}. "I cannot find my way home," {name} said.

"Yes, I can," said {elder}. "Just follow {path}. {sign}."
{Elder} nodded. "Follow {path}," {ehe} said. "{sign}."
"Do not worry," said {elder} with a smile. "You only have to follow {path}. {sign}."

"Thank you very much!" said {name} and set off.
{Name} thanked {elder} and followed {path}, step by step.
So {name} followed {path} all the way and did not stop to look at anything else.

?
The sky turned red, and the first star came out.
It was a long way, but {name} was not afraid any more.
Now and then {he} sang a little song to be brave.

---

At last {he} saw a light in a window. It was home!
And then {name} saw {his} own front door. "I am home!" {he} shouted.
Soon everything looked right again. There was {his} house!

{?family}{His} mother ran out and hugged {him}. "We were looking for you!" she said.
{?family}{His} father stood at the door. "There you are!" he called and held {him} tight.
{?made}All the others ran out and hugged {him}. "We were looking for you!" they said.
{?made}Everyone at home was so glad to see {him}. They gave {him} a big hug.

?
{Name} told the whole story, and then there was warm soup for everyone.
"I will never run so far away again," said {name}.
{Name} was so happy to be home. Next time {he} would look where {he} was going.
"When you are lost, stay calm and ask for help," said {name}. "That is what I learned."

<sleep>
Home had never felt so good.
And {name} never forgot the way home again.
The next day {name} took a cake to {elder} to say thank you.
"""

_TREASURE = """
@note
a note in a bottle
an old map in a book
a letter under the door
a paper with a big red cross
@first, second
{?out}under a blue stone ; in a hollow log
{?out}behind the old well ; under three white stones
{?out}next to the tall gate ; in a red pot
{?out}on top of the wall ; in a round box
{?in}behind the door ; in a red pot
{?in}under the clock ; in a round box
{?in}next to the window ; in an old boot
{?in}on top of the shelf ; under a blue pillow
@giver, she
grandmother ; she
grandfather ; he
uncle ; he
aunt ; she

?6
<open>

{One_day} {intro} found {note}.
{One_day} {intro} and {his} friend {pal} found {note}.
{One_day} {intro} got up and found {note}.

{He} showed it to {his} friend {pal}. "It is about a treasure!" {he} said.
"Look!" {he} said to {his} friend {pal}. "This can show us a treasure!"
"Is this a treasure hunt?" {he} asked {his} friend {pal}. They were both very excited.

It said, "Go {to_place} and look {first}."
They read it together. It said, "The way starts {in_place}. Look {first}."

---

So they went {to_place}. And {first} they found a second note!
They went {to_place} at once. They looked {first} and found another note.
{Name} and {friend} hurried {to_place}. It was not easy, but {first} they found one more note.

"[Take|Go] ten big steps and look {second}," {friend} read.
It said, "You are [near|close] now! Look {second}."
"Turn around two times and then look {second}," it said.

?
{Name} counted the steps. One, two, three, and on and on.
"I can hardly wait!" {friend} said and {name} laughed.
They looked in the wrong place first. "Let us try again," said {friend}.
"You look on the left, and I will look on the right," said {name}.

At last they looked {second}, and there was {a_thing}!
Then they saw it. There, {second}, was {a_thing} with a pretty bow!
And there it was! They found {a_thing} {second}.

---

"Who put it here?" {friend} asked. Then they heard someone laugh behind them.
Next to it lay a last note. It said, "You did it! Love from your {giver}."
"We found it!" they shouted. "But who made this hunt for us?"

It was {name}'s {giver}! "I wanted you to have some fun," {she} said.
"I made the hunt for you," said {name}'s {giver}, who had come along behind them.

?
"It was the best game ever!" said {name}. {He} hugged {his} {giver}.
"Thank you!" {name} said. "{Friend} and I will share {the_thing}."
"That was so much fun!" said {friend}. "Can we do it again?"
They thanked {his} {giver} and laughed about the hunt all the way home.

?
"The {thing} is nice," said {name}, "but the best part was finding it with you, {fcall}."
"A treasure is best when you find it with a friend," said {friend}.
{Name} and {friend} took turns with {the_thing}, and both were {happy}.

<friends>
<home>
<sleep>
"""

_MIXED_UP = """
?6
<open>

{Intro} had {a_thing}, and {one_day} {he} took it {to_place}.
{One_day} {intro} went {to_place} with {a_thing}.
{One_day} {intro} took {his} {adj_thing} {to_place}.

{Name} put it down and played with the others all day.
Many others were there too. {Name} put {the_thing} on a big pile of things.
There was music, and {name} put {the_thing} on a bench to dance.
{Name} put {the_thing} next to some other things and had a lot of fun.

When it was time to go, {name} picked up a {thing} and hurried home.
Then it got late, and {name} took a {thing} and {ran} home.
In the evening {name} was tired. {He} took a {thing} and went home without looking at it.

---

At home {name} looked at it. "Wait, this is not my {thing}!" {he} said.
But at home {he} saw a small [star|heart|moon] on it, and there was none on {his} own {thing}!
But at home {name} saw that this {thing} was much newer than {his} own.
But at home it did not look right. "This is not mine," said {name}.

?
"I took the wrong one," {he} thought. "Now somebody is sad because of me."
{Name} felt bad. {He} had taken something that was not {his}.
{He} liked the new one. But it was not right to keep it.

"I must take it back [at once|right away]," said {name}, and {he} {ran} out of the door.
{Name} did not wait and went straight back {to_place}.
So {name} went all the way back {to_place}, and {he} hoped that {he} was not too late.

---

There stood {a_friend}{fnamed} and looked [sad|here and there]. "This is not my {thing}," {fhe} said.
There {he} saw {a_friend}{fnamed}. "I think I have the wrong {thing}," {fhe} said.
{A_friend}{fnamed} was still there. "Have you seen my {thing}?" {fhe} asked.

"I am so sorry," said {name}. "I took yours by mistake."
"I think this is yours," {name} said. "I made a mistake. Please forgive me."
"Here it is," said {name}. "They look the same, so I took the wrong one. I am sorry."

{Friend} laughed. "That can happen to anyone," {fhe} said. "Here is yours."
"I am not angry," said {friend}, and {fhe} gave {name} the right one.
"Oh, good!" said {friend}. "And this one must be yours."

?
They put the two side by side and laughed. Then they played together.
They painted a little flower on one of them. Now they would never be mixed up again.
"Now let us look for the difference," said {name}. They looked and laughed for a long time.

{?unnamed}Since then the two of them always looked twice before they took something home.
"A mistake is not so bad when you put it right," said {name}.
<friends>
<home>
<sleep>
"""

LOST_PLOTS = (
    plot("lost", WALKERS, _LOST, thing="keep", place="any"),
    plot("found", WALKERS, _FOUND, thing="keep", place="any"),
    plot("way home", WALKERS, _WAY_HOME, place="out"),
    plot("treasure", frozenset({"animal", "child"}), _TREASURE, thing="any", place="any"),
    plot("mixed up", WALKERS, _MIXED_UP, thing="made", place="any"),
)
