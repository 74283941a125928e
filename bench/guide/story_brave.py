"""Plots about fear, practice, contests and honesty."""

from __future__ import annotations

from bench.guide.story_grammar import plot
from bench.guide.story_words import WALKERS

MOVERS = WALKERS | {"wheels", "boat"}

_FEAR = """
@fear, others, step, deed
{?walker}the high slide ; went down the high slide ; went up three steps and came down again ; went down the high slide
{?walker}{?dry}deep water ; jumped into the lake ; put one foot into the water ; swam in the deep water
{?walker}the old bridge ; ran over the old bridge ; took one step on the old bridge ; went over the old bridge
{?walker}the dark ; played outside at night ; looked out of the door at the stars ; walked around in the dark
{?walker}the high swing ; went up and down on the high swing ; sat on the swing for a minute ; went high on the swing
{?wheels}the long tunnel ; went through the long tunnel ; went up to the tunnel and looked in ; went through the tunnel
{?wheels}the high bridge ; went over the high bridge ; put one wheel on the bridge ; went over the high bridge
{?wheels}the dark ; went out at night ; went out for just a minute ; went all around town in the dark
{?boat}the big waves ; danced on the big waves ; went a little way out ; danced on the big waves
{?boat}the open sea ; went out on the open sea ; went to the end of the harbor ; went out on the open sea
{?cloud}{?sky}the strong wind ; flew with the strong wind ; let the wind push a little ; flew with the strong wind
{?cloud}{?sky}the loud thunder ; danced in the thunder ; listened to the thunder from far away ; danced in the thunder
{?star}{?sky}the dark ; came out when it was dark ; came out for just a minute ; came out every night
{?star}{?sky}high places ; went up to the top of the sky ; went up a little bit ; went up to the top of the sky
{?plane}{?sky}big clouds ; flew through big clouds ; put one wing into a cloud ; flew through big clouds
{?plane}{?sky}high places ; flew over the highest mountain ; flew over a small hill ; flew over the highest mountain

<open>

{Name} liked many things, but {he} was afraid of {fear}.
{Name} was happy most of the time. There was only one problem. {He} was afraid of {fear}.
There was one thing that {name} did not like at all, and that was {fear}.
{Name} could do many things, but when it came to {fear}, {he} was afraid.

When the others {others}, {name} only watched.
{One_day} all the others {others}. Only {name} did not come.
The others often {others}. They laughed and called, but {name} stayed behind.

?
"Come with us, {call}!" they called. "Not today," {name} always said.
"I wish I were brave," {he} said to {himself}.
{Name} felt small and sad. {He} wanted so much to be there too.

---

{His} friend {pal} came to {him} one day. "Are you afraid?" {fhe} asked. {Name} nodded.
{His} friend {pal} saw this. "What is wrong?" {fhe} asked. "I am afraid of {fear}," said {name}.
Then {his} friend {pal} asked, "Why do you never come?" {Name} told {fhim} the truth. "I am afraid."

?
"Everyone is afraid of something," said {friend}. "I was afraid too, once."
{Friend} did not laugh. "I know how that feels," {fhe} said.
"That is nothing to be ashamed of," said {friend}. "Shall we try it together?"

"We will take one small step every day," {fhe} said. "I will stay right next to you."
"You do not have to do it all at once," said {friend}. "Start with something small."
"Being brave means that you are afraid and still try," {friend} said.

So on the first day {name} {step}. That was all.
On the first day {name} {step}. {His} heart beat fast.
{Name} took a deep breath. Then {he} {step}.

?
"Well done!" called {friend}. "You see? Nothing bad happened."
"That was not so bad," {name} said and smiled a little.
"You did it!" said {friend}. "Tomorrow we will try a little more."

---

The next day {name} tried a little more, and the day after that a little more again.
Every day it was a bit easier.
{Name} did it again and again. Each time {he} was a little less afraid.

Then the big day came. {Name} looked at {friend}, counted to three, and {deed}!
And one morning {name} said, "Now I will do it!" And {he} really {deed}.
At the end of the week {name} {deed}, and {friend} was right there with {him}.

?
"I did it! I really did it!" {he} shouted. It was fun!
"Hooray!" everyone shouted. {Name} laughed out loud.
It was not bad at all. It was wonderful! "Again!" called {name}.
{Name} was so proud, and {friend} was proud too.

You can be afraid and brave at the same time.
"Thank you for helping me," {name} told {friend}. "With a friend it is easy to be brave."
After that, {name} was not afraid of {fear} any more.
And when somebody else was afraid, {name} was the first to help.
<friends>
"""

_STORM = """
@shelter
under a big rock
in an old shed
in a hollow tree
in an empty hut
under a wooden roof

?6
<open>

{One_day} {intro} and {his} friend {pal} played {in_place}.
{One_day} {intro} went {to_place} with {his} friend {pal}. The sky was blue, and they had a lot of fun.
It was a hot day. {Intro} and {his} friend {pal} were {in_place}.

But then dark clouds came. The wind blew harder and harder.
Then the sky turned gray, and a cold wind began to blow.
All at once it got dark. Big black clouds were in the sky.

?
Plop, plop! The first drops fell. Then there was a loud boom!
Then it began to rain, and soon they were wet from head to toe.
There was a flash of light, and then it went boom!

"A storm!" cried {friend}. "What can we do?"
"I am afraid," said {friend} and took hold of {name}.
{Friend} began to shake. {Fhe} did not like thunder at all.

---

"We must find a dry place," said {name}. "Come with me!"
{Name} was a little afraid too, but {he} looked around. "Over there!" {he} called.
"Stay close to me," said {name}. "I know a place where it is dry."

They hurried and sat down {shelter}.
They ran through the rain and found a dry spot {shelter}.
Soon they sat close together {shelter}. There it was dry.

?
Boom! went the thunder. {Friend} held {fhis} ears.
The wind cried and the thunder was loud. {Friend} closed {fhis} eyes.
The rain fell and fell, and it did not stop.

"Let us sing," said {name}. "When we sing loud, we cannot hear the thunder."
"The thunder is only a big drum in the sky," said {name}. "Let us drum too!" And they clapped and stamped.
"Let us count," said {name}. "After each flash we count until the boom. Then we know how far away it is."

?
So they did, and {friend} was not so afraid any more.
Soon {friend} laughed and forgot to be afraid.
It helped. They both felt much better.

---

After some time it was quiet. The rain had stopped.
Then the thunder went far, far away, and the sun came out.
At last the dark clouds went away.

"Look!" said {friend}. Over the hills there was a big rainbow.
They looked out and saw a rainbow, red and yellow and green and blue.
Everything was wet and bright, and a rainbow stood in the sky.

?
They jumped in all the puddles on the way home.
They walked home through the puddles and laughed. Their feet went splash, splash!
They went out, looked up and said, "How beautiful!"

After every storm the sun comes back.
"The storm was not so bad," said {friend}, "because you were with me."
{Name} was glad that they had stayed together.
<friends>
<home>
<sleep>
"""

_NOISE = """
@noise, maker, reason, comfort
tap, tap, tap ; a small bird at the window ; It was cold and wanted to come in ; let it in and gave it some bread
{!kitten}scratch, scratch ; a tiny kitten at the door ; It had lost its way in the dark ; gave it warm milk
hoo, hoo ; a baby owl on the roof ; It could not find its mother ; held up a light until the mother came
{!mouse}{!cat}squeak, squeak ; a little mouse under the bed ; It was very hungry ; gave it a bit of cheese
{!hedgehog}bump, bump ; a baby hedgehog in an empty box ; It could not get out ; opened the box and gave it an apple
{!puppy}sniff, sniff ; a small puppy on the step ; It was alone and cold ; put a warm blanket around it

<open>

One dark and quiet night {name} lay in bed.
One night {name} could not sleep, and the moon looked in at the window.
One night {name} was almost asleep.
It was a dark night, and {name} was already in bed.

Then {name} heard a noise. "{Noise}," it went.
But then something went, "{Noise}!"
All at once there was a strange noise. "{Noise}!"

?6
{Name} sat up. "What was that?" {he} whispered.
{Name} pulled the blanket over {his} head. "Is somebody there?" {he} asked.
{His} heart beat fast. "Who is there?" {he} said softly. Nobody answered.
{Name} held {his} breath and listened. There it was again!

---

?
"Maybe it is a monster," {name} thought. "No, there are no monsters," {he} told {himself}.
At first {name} wanted to hide. But then {he} thought, "I want to know what it is."
"If I do not look, I will be afraid all night," {name} thought.

So {he} took a little lamp and went to look, step by step.
{He} got up, turned on the light and went on tiptoe to see.
{He} was brave. {He} put on {his} shoes, took a light and followed the noise.

?
The floor was cold, and every shadow looked big.
{Name} stopped, and the noise stopped too. Then it went on.

And what did {he} see? It was only {maker}!
Then {name} laughed, because it was only {maker}!
The noise came from {maker}.

"Oh, it is only you!" said {name}. {Reason}.
{Reason}. "You are more afraid than I am," said {name}.
{Reason}. "You poor little thing," {name} said.

---

{Name} was not afraid any more. {He} {comfort}.
Now {name} knew what to do. {He} {comfort}.
"I will help you," said {name}. And {he} {comfort}.

?
The little animal looked at {him} with thankful eyes.
After that, it was quiet and happy.
"Good night, my little friend," {name} whispered.

?8
{Name} went back to bed. The dark was not so bad now.
Then {name} yawned and lay down again.
{Name} smiled in the dark.

Many things are not scary at all when you take a good look at them.
And if there was a noise at night after that, {name} just smiled and slept on.
The next night {name} heard the noise again, and {he} was glad.
In the morning {name} told everybody how brave {he} had been.
<sleep>
"""

_LEARNING = """
@skill, did, fails
{?walker}{!water}ride a bike ; rode {his} bike ; fell over with the bike
{?walker}whistle ; whistled ; blew and blew until there was no air left
{?walker}{?dry}{?water}swim ; swam ; splashed and went under like a stone
{?walker}jump rope ; jumped rope ; got the rope around {his} feet
{?walker}stand on {his} head ; stood on {his} head ; fell on {his} back
{?walker}{?town}skate ; skated ; slipped and fell on {his} back
{?wheels}go backward ; went backward all the way ; bumped into a fence
{?wheels}turn around on a small road ; turned around on the road ; got stuck in the grass
{?boat}turn around in the wind ; turned around in the wind ; bumped into the dock
{?boat}go through a small gap ; went through the gap ; bumped into a rock
{?cloud}{?sky}make rain ; made rain ; squeezed and squeezed without a single drop
{?star}{?sky}shine all night ; shone all night long ; got tired and went out after a minute
{?plane}{?sky}fly in a circle ; flew in a circle ; went up and down and got all mixed up
{?plane}{?sky}land on the grass ; landed ; bumped and jumped like a frog

?7
<open>

{Intro} wanted to learn how to {skill}. All the others could do it already.
There was one thing that {intro} wanted more than anything. {He} wanted to learn how to {skill}.
{One_day} {intro} said, "I want to learn how to {skill}!"
{Intro} saw how {his} friend {pal} could {skill}. "I want to do that too!" {he} said.

{He} went {to_place} and tried, but {he} {fails}.
So {he} tried it {in_place}, but {he} {fails}.
{In_place} {he} tried it for the first time. Oh no! {He} {fails}.

?
{He} tried again and again, and it did not work.
The second time was not better, and the third time was even worse.
Then {he} tried one more time, and it went wrong again.

"I will never learn it!" {name} cried. {He} wanted to give up.
"It is too hard for me," {name} said with a long face.
{Name} was {sad}. "Why can everyone do it but me?" {he} asked.

---

{A_elder} had watched {him} and came closer.
Then {a_elder} came by, and {name} told {ehim} everything.
{A_elder} heard this and shook {ehis} head.

"Nobody can do it the first time," said {elder}. "Try it a little every day."
"I had to try a hundred times," said {elder}. "Each time you learn something."
"You cannot do it yet," said {elder}, "but one day you will."

?
"Really?" asked {name}. "Then I will try again tomorrow."
{Name} thought about that. "All right," {he} said, "I will try a little every day."
That gave {name} hope. {He} wanted to try again.

{!star}So {name} tried on Monday, and {he} tried on Tuesday. {He} tried in the sun and in the rain.
{!sky}Every morning {name} went {to_place} to practice. Some days were good, and some days were bad.
{Name} practiced day after day. It was slow, but {he} did not stop.

?6
Once {he} almost did it!
"A little better," {elder} said now and then, and {name} was glad.
"I can feel that it is getting better," said {name}.

---

And then one day it worked. {Name} {did}!
Then came the day when {name} {did} without any help.
One week later {name} tried again. And look! {He} {did} as if it was easy.

?
"I can do it! Look, I can do it!" {he} shouted.
"Look at me!" {name} called. "Look what I can do!"
{Name} laughed out loud and did it again, just for fun.

?
{Elder} clapped and smiled. "I knew that you could," {ehe} said.
All {his} friends came to look. "Hooray for {name}!" they called.
"You see?" said {elder}. "You only had to keep trying."

If you do not give up, you can learn almost anything.
{Name} was so proud that {he} did it all day long.
Then {name} began to teach the little ones. "Try a little every day," {he} told them.
And {name} never said "never" again.
{!sky}<home>
"""

_RACE = """
@end
{!sand}the old oak tree
the tall tower
{!boat}the red gate
{!boat}the white fence
{?boat}the lighthouse
the big rock

?7
<open>

{One_day} there was a big race {in_place}. {Intro} wanted to win it.
{One_day} {intro} and all the others met {in_place} for a race.
"Who is the fastest of us all?" everyone asked. So {one_day} there was a race {in_place}, and {intro} was in it.

{A_friend}{fnamed} was in the race too, and {fhe} was very fast.
{His} friend {pal} wanted to win too. "May the best one win!" said {friend}.
{Name} stood next to {a_friend}{fnamed}. "Good luck!" they said to each other.

They had to go all the way to {end}.
"The first one at {end} wins," somebody called.
The race went from one side to {end}, and that was a long way.

?
"One, two, three, go!" And off they went.
"Ready? Go!" All of them went as fast as they could.
Somebody rang a bell, and the race began.

---

{Name} was fast, and {friend} was fast, and soon the two of them were in front.
First {friend} was in front, and then {name} was in front.
{Name} was first, and {friend} was right behind {him}.

{!boat}It was not far now, but then {friend} hit a stone and cried out.
{?walker}They could already see {end}. All at once {friend} slipped and fell.
{?wheels}They could already see {end}. All at once {friend} slipped and got stuck in the mud.
{!boat}{!sand}Just before {end} there was a bump. {Friend} went right into a ditch!
{?boat}It was not far now. But then a big wave came, and {friend} got stuck on the sand.
{?boat}They could already see {end}. All at once {friend} hit a rock and cried out.

?
"Ouch!" cried {friend}. "I cannot go on!"
{?walker}{Friend} tried to get up, but it hurt too much.
{!walker}{Friend} tried to move, but {fhe} could not.
"Help me!" called {friend}. The others just went past {fhim}.

{Name} could have won now, but {he} stopped and turned around.
{Name} saw {end} in front of {him}. Then {he} looked back, and {he} stopped.
What should {name} do? {He} did not think for long and went back.

---

?
"You will lose the race!" said {friend}. "You are more important than a race," said {name}.
{?walker}"I will help you," said {name}. "Lean on me."
{!walker}"I will help you," said {name}. "I can pull you."
"But you could win!" said {friend}. "I do not want to win without you," said {name}.

{Name} helped {friend}, and they went on very slowly, side by side.
So the two of them went on together, bit by bit.
{Name} pulled and {friend} did {fhis} best. Slowly they went on.

They were the very last ones at {end}, but everybody clapped for them.
When they came to {end}, the race was over, but everyone shouted, "Hooray!"
Somebody else won the race, but the loudest cheers were for {name} and {friend}.

?
"You are the real winner, {call}," said {friend}.
"You did not win the race," said {friend}, "but you won a friend."
They both got a red ribbon, because being kind is worth a prize too.

Winning is nice, but helping is better.
Next time {name} might win, but today {he} had done something better.
{Name} did not mind being last. {He} was {happy}.
<friends>
<home>
"""

BRAVE_PLOTS = (
    plot("fear", MOVERS | {"sky"}, _FEAR),
    plot("storm", WALKERS, _STORM, place="wild"),
    plot("noise", WALKERS, _NOISE),
    plot("learning", MOVERS | {"sky"}, _LEARNING, place="out"),
    plot("race", MOVERS, _RACE, place="out"),
)
