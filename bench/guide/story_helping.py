"""Plots about help in need, and about somebody new."""

from __future__ import annotations

from bench.guide.story_grammar import plot
from bench.guide.story_words import WALKERS

_STUCK = """
@trap, tool, the_tool
in deep mud ; a long branch ; the branch
in a hole in the ground ; a strong rope ; the rope
between two big rocks ; a long stick ; the stick
in a bush full of thorns ; a pair of thick gloves ; the gloves
under a fallen tree ; a strong rope ; the rope

?6
<open>

{One_day} {intro} was {in_place}. {He} was [picking flowers|singing a song|looking for nuts].
{One_day} {intro} went for a walk {in_place}.
{One_day} {intro} was on {his} way {to_place}.

All at once {he} heard a cry. "Help! Please help me!"
Then somebody called, "Help! Is anybody there?"
"Help! Help!" a small voice called.

?
{Name} stopped and listened. Then {he} {ran} to see who it was.
{He} did not think twice. {He} {ran} as fast as {he} could.
"I am coming!" {name} shouted and {ran}.

There was {a_friend}{fnamed}. {Fhe} was stuck {trap}!
It was {a_friend}{fnamed}. {Fhe} was stuck {trap} and could not get out.
{He} saw {a_friend}{fnamed}. "I am stuck {trap}," {fhe} said. "I cannot get out."

---

?
"Do not be afraid," said {name}. "I will get you out."
"Stay calm," {name} said. "I will help you."
{Name} knew {he} had to help. "Hold on!" {he} said.

?
{He} pulled with all {his} might, but {friend} was still stuck.
First {name} tried it alone, but it was too hard.
{He} pulled once. {He} pulled twice. It did not work.

Then {name} had an idea. {He} {ran} off and came back with {tool}.
"Wait here," said {name}. {He} looked all around and found {tool}.
{Name} thought hard. "I need {tool}," {he} said and went to get one quickly.

With {the_tool} it was much easier. {Name} counted, "One, two, three!"
"Now!" called {name}. With {the_tool} {he} tried again, and {friend} helped too.
{Name} used {the_tool} and worked slowly and carefully.

And out came {friend}! {Fhe} was dirty, but {fhe} was free.
Plop! {Friend} was free at last.
And then it was done. {Friend} could move again!

---

"Thank you!" said {friend}. "You saved me, {call}!"
"I was so afraid, and you came," {friend} said. "I will never forget it."
{Friend} hugged {name}. "You are so brave and so kind!" {fhe} said.

?
"You would do the same for me," said {name}.
"I am glad that I heard you," said {name}.
{Name} smiled and felt very proud.

?
A few days later {name} slipped and fell. And who came to help {him}? It was {friend}!
They washed in the river, and then they ate apples in the sun.
{Friend} took {name} home and made hot tea.

?7
Those who help others will never be alone.
"It is good to have a friend," said {name}.
That is how a bad day became a good day.

<friends>
<home>
"""

_OLD_HELP = """
@person, she, her, hers
{!female}old woman ; she ; her ; her
{!male}old man ; he ; him ; his
{!female}grandmother with white hair ; she ; her ; her
{!male}grandfather with a long beard ; he ; him ; his
@load
a heavy bag
two big bags
a box full of apples
a big basket full of wood

?6
<open>

{One_day} {intro} wanted to play {in_place}. There {he} saw an {person} with {load}.
{One_day} {intro} met an {person} {in_place}. {She} had to carry {load}.
{One_day} {intro} was {in_place}. An {person} came along very slowly with {load}.

?
"Oh dear," {she} said, "this is too heavy for me."
{She} had to stop after every step.
{She} put it down and wiped {hers} face. {She} looked so tired!

?
{Name} wanted to play, but {he} felt sorry for {her}.
{Name}'s friends called, "Come and play!" But {name} did not go.
Others walked past and did not help. But {name} stopped.

"May I help you?" {he} asked. "I am strong."
"Let me carry that for you," said {name}.
"I can help you," {name} said. "Where do you live?"

---

"You are very kind," {she} said. "My house is behind the hill."
"That would be wonderful," {she} said with a smile. "It is not very far."
"Thank you, my dear," {she} said. "I live in the last house on the road."

?
It was heavy, but {name} did not stop. {He} [sang|counted the steps] and walked on.
So they went up the road side by side. On the way {she} told funny stories about the old days.
{Name} carried it all the way, and they talked about birds and flowers.

Soon they came to a little house, and {name} put everything on the table.
At last they were there. {Name} put everything down and took a deep breath.
Then they stood in front of a small house with [roses|a red roof]. "Here we are," {she} said.

?
{Name} also brought in some water and swept the floor.
{Name} got a cup of milk and a chair by the window.

---

"Wait," {she} said. "I have something for you." And {she} gave {name} {a_thing}.
Then {she} opened an old box and took out {a_thing}. "This is for you," {she} said.
"You helped me, and now I want to give you this," {she} said. It was {a_thing}!

?
"I did not help you to get a gift," said {name}. "I know," {she} said, "and that is why you get one."
"For me?" asked {name}. "But I was happy to help." {She} laughed. "Take it. It is from the heart."
"You do not have to give me anything," said {name}. "But I want to," {she} said and smiled.

{Name} thanked {her} and went home with {the_thing}. {He} was {happy}.
{Name} was so glad that {he} {ran} home to show {the_thing} to everyone.
{!thing food}"Thank you! I will take good care of it," {name} said and gave {her} a hug.
{?thing food}"Thank you! I like that very much," {name} said and gave {her} a hug.

After that, {name} came to help every week, and there was always hot milk with honey.
From then on they were friends, the young one and the old one.
That night {name} could not stop smiling. It feels good to help.
"A kind heart is worth more than gold," {she} often said, and {name} never forgot it.
It does not take much to be kind.
{!thing food}And each time {name} saw {the_thing}, {he} thought of {her} and smiled.
"""

_BABY_BIRD = """
@where
in the grass
on the ground
under a tree
next to a stone

?6
<open>

{One_day} {intro} was {in_place}. {He} heard a small sound. "Peep, peep!"
{One_day} {intro} went {to_place}. Something there went, "Peep, peep!"
{One_day} {intro} was playing {in_place} when {he} heard, "Peep, peep!"

{He} looked {where} and found a baby bird. It was very small.
{Where} sat a tiny bird. It could not fly yet.
There, {where}, sat a little bird with almost no feathers.

?
"Where is your nest?" {name} asked. The bird only said, "Peep!"
"You poor little thing," said {name}. "Did you fall down?"
It was cold and afraid. {Name} felt {sad} for it.

---

{Name} looked up. High in a tree there was a nest, but it was too high for {him}.
{Name} saw the nest in a tree, but {he} could not get up there alone.
In a tree {he} saw the nest. Two more baby birds looked down from it.

"I will get help," {he} said, and {he} {ran} to {his} friend {pal}.
So {he} told the bird to wait and {ran} to get {his} friend {pal}.
{He} called {his} friend {pal}. "Come quick!" {he} said. "A baby bird needs our help."

{Friend} came at once and brought a long ladder.
Soon they were back with a ladder, and they put it against the tree.
"I know where there is a ladder," said {friend}, and they got it together.

{Friend} held the ladder, and {name} went up, step by step, with the bird in a soft cloth.
"Hold the ladder, please," said {name}. Then {he} took the bird and went up very slowly.
{Name} put the bird in {his} hat and went up. {He} did not look down.

?
"Be careful!" {friend} called from below.
The wind blew and the ladder shook a little, but {name} was brave.

Then {he} put the bird back into the nest, right next to the others.
At last {name} was at the top. {He} put the bird into the nest, and it was safe.

---

Soon the mother bird came back with a worm. She sang and sang for joy.
Then the mother bird flew home. She saw that all her babies were there, and she was {happy}.
All the little birds said, "Peep!" And their mother flew around {name} to say thank you.

?
"We did it!" said {friend}. {Name} was very proud.
{Name} and {friend} smiled and sat under the tree to listen.
"Good work, {fcall}!" said {name}. "Good work, {call}!" said {friend}.

?
A few weeks later the little bird could fly. It sang at {name}'s window every morning.
In the summer the bird learned to fly, and it often came to visit {name}.
From then on there was always a bird that sang when {name} came by.

Even somebody very small can need a big friend.
It is good to help those who are smaller than you.
<friends>
<sleep>
"""

_STRANGER = """
@skill, show
tell wonderful stories ; told a story about a whale and a star
whistle like a bird ; whistled, and all the birds came
make boats out of paper ; made a paper boat for everybody
do funny tricks ; stood on one leg and made everybody laugh
draw with a stick ; drew a big castle on the ground

?6
<open>

{One_day} {intro} and the others were {in_place} when somebody new came along.
{One_day} {intro} saw a new face {in_place}.
{One_day} {intro} was {in_place} with all the others, but someone new sat there all alone.

It was {a_friend}{fnamed} who had just come from far away.
It was {a_friend}{fnamed}, and {fhe} did not know anybody here.
Nobody knew {fhim}. It was {a_friend}{fnamed} from another land.

"Who is that?" the others asked, but nobody went over to say hello.
The others looked at {fhim} and whispered, but they did not ask {fhim} to play.
The others did not want to play with someone they did not know.

?
{Friend} looked down at {fhis} feet and was very quiet.
{Friend} sat down alone and looked {sad}.
{Friend} watched the game from far away.

---

?
{Name} remembered how it feels to be new. {He} did not like to see anyone alone.
{Name} was a little shy too. But {he} took a deep breath.
"How would I feel all alone?" {name} thought. It was not a nice thought.

{?named}So {name} went over. "Hello, I am {proper}," {he} said. "Come and play with us!"
So {name} {walked} over and smiled. "Do you want to play with us?" {he} asked.
{Name} sat down next to {fhim}. "You can play with me, if you like," {he} said.

"I would like that very much," {friend} said softly.
"Yes, please!" said {friend}, and {fhe} smiled a little.
"May I really?" asked {friend} and smiled.
"I thought that nobody would ask me," said {friend} and jumped up.

They played [ball|a running game|hide and seek], and soon they were laughing.
First they just talked, and then they ran and played until they were out of breath.
They built a tower of stones together, and it was very high.

---

Then {friend} showed {name} that {fhe} could {skill}.
"What do you like to do?" asked {name}. "I can {skill}," {friend} said.
And then {name} found out that {friend} could {skill}.

{Fhe} {show}. "That is wonderful!" {name} called.
So {friend} {show}, and {name} clapped.
{Name} wanted to see it, so {friend} {show}.

Now the others came over too. "Can you show us how to do that?" they asked.
The others came closer and closer. "May we play too?" they asked.
The others were sorry that they had not said hello. "Please play with us," they said.

?
And nobody was alone any more.
{Friend} was not a stranger now. {Fhe} was one of them.
"Thank you for saying hello," {friend} told {name}.

"A stranger is just a friend that you do not know yet," said {name}.
One kind word can make a new friend.
<friends>
<home>
"""

HELPING_PLOTS = (
    plot("stuck", WALKERS, _STUCK, place="wild"),
    plot("old help", WALKERS, _OLD_HELP, thing="any", place="out"),
    plot("baby bird", WALKERS, _BABY_BIRD, place="green"),
    plot("stranger", WALKERS, _STRANGER, place="any"),
)
