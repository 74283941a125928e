"""Plots about what takes time or many: a seed, a wish, something too big for one."""

from __future__ import annotations

from bench.guide.story_grammar import plot
from bench.guide.story_words import WALKERS

_SEED = """
@plant, grows, end
sunflower ; It grew taller than {name} ; The birds came to eat its seeds, and {name} kept some for the next year
apple tree ; It grew leaves and white flowers ; Years later there were red apples, enough for everybody
pumpkin ; It grew and grew until it was as big as a chair ; They made soup from it for all the neighbors
rose ; It had one bud, then two, then ten ; It smelled so sweet that bees came from far away
bean ; It went up and up along a stick ; There were so many beans that everyone got a bag full
@giver
an old woman
an old man
{?family}{his} grandmother
{?child}{his} teacher
a kind neighbor

?6
<open>

{One_day} {intro} got a tiny seed from {giver}. "What is in it?" {he} asked. "You will see."
{One_day} {intro} got a seed from {giver}. It was as small as the eye of a mouse.
{Intro} had a little brown seed. It was a gift from {giver}.
"Put this into the ground," {giver} said to {name} {one_day}. It was a small, round seed.

{Name} dug a hole {in_place}, put the seed in and gave it some water.
{Name} took it {to_place}, put it into the ground and gave it water.
So {name} went {to_place} and planted the seed in a sunny spot.

Then {he} sat down and waited, but nothing happened.
"Grow, little seed, grow!" said {name}, but there was nothing to see.
The next morning {he} {ran} to look, but there was only brown earth.

?
"It does not grow!" {name} said. "Maybe it is a bad seed."
"Why does it take so long?" {name} asked. {He} was not happy.
"I want to see it now," said {name}. "Not tomorrow. Now!"

---

{His} friend {pal} laughed. "A seed needs water and sun, and it needs time," {fhe} said.
"You must wait," said {his} friend {pal}. "Good things take time."
{His} friend {pal} looked at the ground. "It is still sleeping down there," {fhe} said.

Waiting was hard, but {name} gave it water every day.
So {name} came every day, brought water and sang a little song to it.
{Name} wanted to dig it up and look, but {he} just gave it water.

?
It rained, and the sun shone, and the days went by.
One week went by, and then another week.
Some days were warm, and some days were cold.

?
{Name} almost gave up. Only {friend} said, "Wait a little more."
"Is it still there?" {name} asked. "Yes," said {friend}, "it is."

Then one morning there was something small and green!
And one day a tiny green leaf looked out of the ground. "{Fcall}, come quick!" called {name}.
Then {name} saw it. A little green tip came out of the earth!

---

It was a {plant}! {Grows}.
Now everyone could see that it was a {plant}. {Grows}.
After that, the {plant} grew fast. {Grows}.

?
"Look how big it is!" {he} said.
All the neighbors came to look at it.
"It is beautiful," said {friend}.

?
{Name} was very proud. "I planted it when it was so small," {he} told everyone.
"You took good care of it," said {friend}.
{Name} and {friend} danced around it.

{End}.
{Name} was so happy! {End}.

Good things take time, and waiting is worth it.
{Name} knew now that big things can begin very small.
And {name} put a new seed into the ground and waited again.
<friends>
"""

_WISH = """
@job, done
{?out}paint the fence ; the whole fence was white
{?soil}pick the apples ; all the apples were in the baskets
{!soil}wash the windows ; all the windows were clean and bright
{?soil}feed the chickens ; all the chickens were fat and happy
{?out}sweep the leaves ; there was not one leaf on the ground
{?in}sweep the floor ; the floor was as clean as a plate
{?in}paint the wall ; the whole wall was blue

?6
<open>

One night {intro} saw a shooting star. "I wish for {a_thing}," {he} said.
{Intro} wanted {a_thing} very much. One night {he} saw a shooting star and made a wish.
One evening {intro} looked up at the stars. "Please, bring me {a_thing}," {he} said.

The next morning {he} looked everywhere, but there was no {thing}.
{He} got up early and looked at the door, but nothing was there.
{He} waited for one day, for two days, for three days, but nothing happened.

?
"The star did not hear me," said {name}. {He} was {sad}.
"Maybe wishes do not come true," {he} said with a long face.
{Name} did not understand it. {He} had wished so hard!

---

{He} told {a_elder} about it. "A wish needs some help from you," said {elder}.
{A_elder} heard this. "A star cannot do all the work," {ehe} said. "You must do your part."
Then {he} met {a_elder}. "Do not just wait for your wish," {ehe} said.

"What can I do?" asked {name}. "You can help me to {job} {in_place}," {elder} said.
"How?" {name} asked. "I have to {job} {in_place}," said {elder}. "You could help me."

So {name} began to {job}, and {he} sang a song.
{Name} went {to_place}, began at once and worked all day.
That was not easy, but every morning {name} went {to_place} and worked.

?
{His} friend {pal} came by and helped a little too.
At night {he} was so tired that {he} fell asleep at once.
Sometimes {he} wanted to stop, but then {he} thought of {his} wish.

After a week {done}.
At last it was finished, and {done}.
{Name} worked until {done}.

---

"You did very well," {elder} said. "Look behind you." And there was {the_thing}!
Then {elder} came with a big bag. "You earned this," {ehe} said. In the bag was {the_thing}!
"I have something for you," said {elder}. {Ehe} held out {the_thing}.

?
"My wish came true!" {name} cried and jumped for joy.
{Name} could not believe it. "Thank you! It is just what I wished for!" {he} said.
"How did you know?" asked {name}. {Elder} winked. "A little star told me."

?
That night {name} looked up at the sky and said, "Thank you, star."
In the evening {name} showed it to the stars. "Look, we did it together," {he} said.
{Name} was very proud, because {he} had worked for it.

A wish comes true when you do something for it.
And the star in the sky seemed to smile.
"Next time," said {name}, "I will wish and work at the same time."
<sleep>
"""

_PULL = """
@what, was, meal
a carrot ; as long as a bed ; carrot soup
a turnip ; as big as a house ; turnip soup
a beet ; as round as the moon ; red soup
a potato ; as big as a cow ; potatoes with butter
@third, last
cow ; ant
horse ; bee
sheep ; mouse
goose ; beetle

?5
<open>

{One_day} {intro} saw something green {in_place}. It was {what}, and it looked very big!
{One_day} {intro} was {in_place} and saw the top of {what} in the ground.
{Intro} had planted {what} {in_place}, and {one_day} it was ready.

{He} wanted to pull it out, but it did not move at all.
{He} pulled with all {his} might, but nothing happened.
{He} pulled and pulled, but it was too hard.

---

So {he} called {his} friend {pal}, and they pulled together, but it did not come out.
{His} friend {pal} came and pulled too, but the two of them could not do it.
{His} friend {pal} came to help. They pulled until they fell down.

Then they called the {third}, and it moved a little bit, but it did not come out.
"We need one more," said {friend}. So the {third} came and pulled too, but it only shook a little.
The {third} came by and pulled with them, but even that was not enough.

"Can I help you?" asked a tiny {last}.
"Let me help too," said a little {last}.

The {third} laughed. "You are much too small!"
"You?" laughed the {third}. "What can a {last} do?"

"Everyone can help," said {name}. "Come and stand behind us."
"Please let me try," said the {last}. "Of course you can try," said {name}.

---

So they all pulled together. One, two, three, and out it came!
They all pulled, and the {last} pulled too, and out it came!
"Now!" called {name}. They pulled, and out it came with a loud plop!

?
It was {was}, and they all laughed and danced around it.
It was the biggest one they had ever seen. It was {was}!
They all fell down and laughed. It was {was}!

?
"You see?" said the {last}. "Sometimes a little help is all you need."
The {third} was sorry. "You are small, but you are strong," the {third} told the {last}.
"Thank you, little {last}," said {name}. "We could not do it without you."

That evening they made {meal}, and everybody ate until they were full.
Then there was {meal} for everyone, and the {last} got the first spoon.
{Name} made {meal}, and they all sat around one big table.

When all help, even the hardest work gets done.
Nobody is too small to help.
And they were all friends after that.
<home>
"""

GROWING_PLOTS = (
    plot("seed", WALKERS, _SEED, place="soil"),
    plot("wish", WALKERS, _WISH, thing="any", place="house"),
    plot("pull", WALKERS, _PULL, place="soil"),
)
