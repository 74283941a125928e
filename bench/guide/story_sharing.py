"""Plots about sharing and giving."""

from __future__ import annotations

from bench.guide.story_grammar import plot
from bench.guide.story_words import WALKERS

_SHARED_MEAL = """
@gift
a jar of honey
some sweet red berries
a warm blanket
a big bag of nuts
a pot of warm soup

?6
<open>

{One_day} {intro} had {a_thing} to eat. {He} took it {to_place}.
{One_day} {intro} went {to_place} with {a_thing} in a little bag.
{One_day} {intro} got {a_thing}. "I will eat it {in_place}," {he} said.
{One_day} {intro} sat {in_place} and was about to eat {a_thing}.

?
It smelled so good! {Name} wanted to eat it all alone.
{Name} was very hungry, and the {thing} looked so good.
"Yum!" said {name}. "This is all for me."
{He} opened {his} mouth to take the first bite.

Just then {a_friend}{fnamed} came by. {Fhe} looked at the {thing} and said nothing.
Then {a_friend}{fnamed} came and sat down. "I have had nothing to eat today," {fhe} said softly.
But then {he} heard a sound. It was the empty belly of {a_friend}{fnamed}!
Then {he} saw {a_friend}{fnamed} who looked very hungry.

---

?
{Name} looked at the {thing}. It was not very big. What should {he} do?
{Name} thought about it. If {he} gave some away, there would be less for {him}.
At first {name} wanted to hide it. But then {he} saw the sad eyes of {friend}.
{Name} did not want to share. But being hungry is no fun, and {he} knew that.

"Here, {fcall}," {he} said at last. "Half of it is for you."
"Come and eat with me," {name} said. {He} gave {friend} the bigger half.
Then {name} smiled. {He} cut the {thing} in two. "One for you and one for me," {he} said.
"Do you want some?" {name} asked. "There is enough for two."

?
"Thank you!" said {friend}. "You are very kind, {call}."
{Friend} could not believe it. "For me? Thank you so much!" {fhe} said.
{Friend} ate and ate, and soon {fhe} smiled again.
"Oh, yes, please!" {friend} said and took a big bite.

They sat side by side and ate and talked. It tasted better than ever.
And how good it was! They laughed and told each other stories.
It was only half as much, but it was twice as much fun.
Soon it was all gone, and both of them were full.

---

The next day {friend} came back. {Fhe} had {gift} for {name}.
The next morning there was a knock. It was {friend}, and {fhe} had {gift} for {name}.
A week later {name} was hungry and cold. Then {friend} came and gave {him} {gift}.

?
"You shared with me," said {friend}. "Now I share with you."
"This is for you, because you were so kind to me," {fhe} said.
"A friend gives and a friend gets," said {friend}, and they both laughed.

{Name} was {happy}. {He} had given half a {thing} and had found a whole friend.
"Sharing makes everything better," said {name}.
When you share, there is always enough.
<friends>
<sleep>
"""

_TAKING_TURNS = """
?6
<open>

{One_day} {intro} and {his} friend {pal} were {in_place}. There they found {a_thing}.
{One_day} {intro} and {his} friend {pal} played {in_place}. They had only one toy, {a_thing}.
{One_day} {intro} went {to_place} with {his} friend {pal}. They took {a_thing} along.

"I want it first!" said {name}. "No, me first!" said {friend}.
Both of them wanted to play with it. "It is my turn!" {name} said.
{Name} took it and would not let go. "I want to play too!" said {friend}.
{Friend} held it on one side, and {name} held it on the other side.

They pulled and pulled. Then they both fell down, and {the_thing} fell into the mud.
They pulled from both sides, and {the_thing} flew up and landed in a big puddle.
{Friend} pulled and {name} pulled. Bump! Both of them sat on the ground.
They shouted at each other, and then nobody said a word.

---

?
Now nobody had any fun. {Name} looked at {friend}, and {friend} looked at {name}.
{Friend} began to cry. {Name} felt bad.
{Name} turned away and was angry. But playing alone was no fun at all.
It was very quiet now. {Name} did not feel happy, and {friend} did not feel happy either.

"I am sorry," {name} said at last. "I do not want to fight with you."
Then {name} took a deep breath. "I am sorry that I pulled," {he} said.
"This is silly," said {name}. "You are more important to me than a {thing}."

"I am sorry too," said {friend}. "What can we do?"
"I am sorry too," {friend} said and dried {fhis} eyes. "Can we share it?"
{Friend} nodded. "We both want it," {fhe} said. "So how can we both have it?"

{Name} had an idea. "We count to ten," {he} said. "Then it is the turn of the other one."
"We can take turns," said {name}. "You may go first."
"You play while I sing a song," said {name}. "When the song ends, we change."

---

So they did. {Friend} played first, and {name} clapped.
That was a good plan. {Friend} had a turn, and then {name} had a turn.
{Friend} liked the idea, and they began at once.

?
Then they found a game that they could play with {the_thing} together, and it was even better.
It was fun to play, and it was fun to watch too.
They laughed so much that they forgot whose turn it was.
More friends came, and all of them had a turn.

?
And nobody had to cry any more.
They played until the sun went down.
"This is much better than fighting," said {friend}.

"Taking turns is more fun than having it all alone," said {name}.
When two friends share, both of them win.
<friends>
<home>
"""

_SICK_FRIEND = """
?6
<open>

{Intro} and {his} friend {pal} wanted to go {to_place} together. But that morning {friend} was sick in bed.
{One_day} {intro} waited for {his} friend {pal}. They wanted to go {to_place}, but {friend} was sick and did not come.
{Intro} had a best friend, {pal}. They wanted to go {to_place}, but then {friend} got sick.

?
{Friend} had to stay in bed and drink tea.
"{Friend} has a cold," somebody told {him}. "{Fhe} must stay in bed."
{Friend} had a fever and was not allowed to go out.

{Name} was {sad}. It was no fun to go alone.
{Name} felt sorry for {friend}. How boring it must be in bed!
"Poor {friend}!" said {name}. "What can I do to make {fhim} happy?"
{Name} thought about {friend} all morning.

---

Then {name} had an idea. {He} found {a_thing} and put it in a bag with a red bow.
"I know what I can do!" said {name}. {He} looked for the best gift and chose {a_thing}.
Then {name} smiled. {He} took {a_thing} and wrapped it in pretty paper.

{He} went to the house of {friend} and knocked on the door.
With the gift under {his} arm {name} {ran} to the house of {friend}.
{He} {walked} all the way to the house of {friend}, even though it was far.

"Come in," said a weak voice. {Friend} lay in bed and looked very pale.
{Friend} lay in bed with a thick scarf. "I am so bored," {fhe} said.
{Friend} sat in bed and looked out of the window. When {fhe} saw {name}, {fhe} smiled a little.

"I have something for you," said {name}. {Friend} opened it and saw {the_thing}.
"This is for you," {name} said and gave {fhim} {the_thing}.
{Name} put {the_thing} on the bed. "It will help you to get well," {he} said.

---

"Oh, {a_thing}!" said {friend}. "How kind of you!"
"I love it!" said {friend}. {Fhis} eyes were bright now.
{Friend} held it and laughed for the first time that day. "Thank you, {call}!"

?
Then {name} sat by the bed and told funny stories.
{Name} stayed all afternoon. They looked at pictures and sang quiet songs.
"Tell me a story," said {friend}. So {name} told one about a bear who could fly.

?
"I feel better already," {friend} said in the evening.
Soon {friend} fell asleep, and {name} went out on tiptoe.
When {name} had to go, {friend} said, "You are the best medicine."

A few days later {friend} was well again, and they went {to_place} together.
The next week {friend} was well, and they both went {to_place} at last.
Soon {friend} could get up, and then at last they went {to_place}. It was a wonderful day.

A visit from a friend can make you well.
It was good to have {friend} back.
<friends>
<sleep>
"""

_COINS = """
@reason
to buy bread for my family
to buy milk for my baby brother
to buy medicine for my grandmother
to ride home on the bus

?6
<open>

{Intro} wanted {a_thing} that {he} had seen in a shop. So {he} worked and saved {his} coins.
In the window of a shop {intro} saw {a_thing}. "I want to save my coins for it," {he} said.
{Intro} had a jar, and in the jar were coins. {He} was saving them for {a_thing}.

?
{He} helped the neighbors, and each time {he} got a coin.
{He} washed windows and swept the yard, and the jar got full.
Every day {he} looked at it and dreamed of having it.

{One_day} {he} had enough at last. {He} {ran} to the shop and sang all the way.
Then the jar was full. {Name} put all the coins in a bag and went to the shop.
After many weeks {he} had ten coins. It was enough! {He} {ran} off to the shop.

---

But on the way {he} saw {a_friend}{fnamed} who was crying.
On the corner stood {a_friend}{fnamed}. Big tears ran down {fhis} face.
Then {he} heard somebody cry. It was {a_friend}{fnamed}.

?
"What is wrong?" asked {name}.
"Why are you crying?" {name} asked and sat down next to {fhim}.

"I lost my coins," {friend} said. "I need them {reason}."
"I had some coins {reason}," said {friend}. "But there was a hole in my bag, and now they are gone."

?
{Name} looked at {his} coins. {He} had worked for them for so long.
{Name} thought about {the_thing} in the shop. Then {he} looked at the sad face of {friend}.
It was not easy. {Name} wanted {the_thing} so much.

"Here," {he} said at last. "Take mine. You need them more than I do."
Then {name} gave {friend} the coins. "I can wait," {he} said. "You cannot."
"Please do not cry," said {name}. "These coins are for you."

?
{Friend} could not believe it. "Thank you, thank you!" {fhe} cried.
{Friend} hugged {him} hard. "I will never forget this," {fhe} said.
"You are so good, {call}!" said {friend}, and {fhe} {ran} off with a smile.

---

?
{Name} went home without {the_thing}. But {he} was not sad.
The jar was empty now, but {name} felt warm inside.
{Name} walked past the shop and did not stop.

But the man in the shop had seen everything. The next day he came to {name}'s house with a box.
The next morning there was a box at the door. It was from the woman in the shop, who had seen it all.
A week later {friend} came with all {fhis} family. They had a box for {name}.

In the box was {the_thing}! "For somebody with a good heart," it said on the card.
{Name} opened it and found {the_thing}. {He} jumped for joy!
"Open it!" everybody said. {Name} opened it, and there was {the_thing}!

When you give with a good heart, good things come back to you.
{Name} was {happy}, but giving had been the best part.
And {name} began to fill the jar again, to help somebody else.
<sleep>
"""

SHARING_PLOTS = (
    plot("shared meal", WALKERS, _SHARED_MEAL, thing="food", place="any"),
    plot("taking turns", WALKERS, _TAKING_TURNS, thing="toy", place="any"),
    plot("sick friend", WALKERS, _SICK_FRIEND, thing="any", place="any"),
    plot("coins", WALKERS, _COINS, thing="made"),
)
