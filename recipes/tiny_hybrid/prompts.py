"""Prompts without end: a few templates over word lists, drawn with a seed.

The text the tiny hybrid learns from is SmolLM2's answers to these, and so are the prompts of its
demo. Simple subjects on purpose: a ten-million-parameter model can learn to write about them.
"""

import random

HEROES = """
a shy fox | a brave little girl | an old fisherman | a young teacher | a tired baker | a curious
boy | a lost dog | a tiny robot | a kind doctor | two sisters | a lonely giant | a clever crow |
a new student | a farmer and his son | a sleepy bear | a small dragon | a bus driver | a young
painter | an honest thief | a grandmother | a rabbit with one ear | a gardener | a sailor | a
quiet librarian | a group of friends | a proud king | a little mouse | a musician | a mountain
guide | a cat who could talk | a postman | a wise owl | a busy ant | a boy with a red kite | a
girl who loved numbers | a clumsy waiter
"""
DEEDS = """
finds a key | learns to swim | loses a shoe | plants a strange seed | makes a new friend |
builds a boat | tells the truth | misses the last train | bakes a cake for the village | hears a
noise at night | wins a race | gets lost in the fog | gives away a coat | opens an old box |
saves a bird | learns to say sorry | finds a map | keeps a promise | shares the last apple |
paints a wall | sees snow for the first time | repairs a clock | writes a letter | climbs a tree
| meets a stranger | searches for water | stops being afraid | returns a lost wallet | discovers
a cave | helps a neighbour | teaches a song | watches the stars
"""
PLACES = """
in a small village | by the sea | in the forest | on a farm | in a big city | at school | on an
island | in the mountains | in a quiet library | at the market | on a long train ride | in an
old house | near a river | in the desert | during a storm | in winter | in a garden | at a
festival | on a bridge | at a hospital | in a bakery | under a full moon | on the first day of
spring | in a tall tower
"""
TOPICS = """
rain | the moon | how bread is made | why leaves fall | volcanoes | bees | the heart |
electricity | magnets | rainbows | how birds fly | sleep | the seasons | plants and sunlight |
the water cycle | friendship | recycling | earthquakes | money | how a bicycle works | music |
languages | the ocean | dinosaurs | computers | healthy food | exercise | honesty | fire | ice |
clouds | maps | trains | gravity | sound | shadows | soap | teeth | the five senses | bridges |
time | the stars | libraries | kindness | deserts | penguins | salt | paper | glass
"""
READERS = """
to a child | in simple words | to a ten-year-old | in one paragraph | in three sentences | with
an example | to a friend | for a school report | step by step | in plain English
"""
TASKS = """
make a cup of tea | learn a new language | clean a room | grow tomatoes | save money | prepare
for an exam | make new friends | sleep better | start running | take care of a dog | write a
letter | cook rice | plan a birthday party | stay calm | read more books | pack for a trip |
draw a face | fix a flat tire | find a lost key | speak in public | wake up early | bake bread |
say thank you | keep a diary | learn to play the guitar | organize a desk | wash a car | make a
salad | choose a gift | help at home
"""
PEOPLE = """
a teacher and a student | two friends | a mother and her son | a doctor and a patient | a
shopkeeper and a customer | a cat and a dog | two neighbours | a traveller and a guide | a
grandfather and a girl | a farmer and a reporter | a chef and a waiter | the sun and the moon |
a coach and a player | a brother and a sister | a librarian and a child
"""

TEMPLATES = (
    (4, "Write a short story about {hero} who {deed} {place}."),
    (2, "Tell me a story {place}. It is about {hero}, and it begins when {hero2} {deed}."),
    (1, "Write a short story with a happy ending about {hero} and {hero2} {place}."),
    (2, "Explain {topic} {reader}."),
    (1, "What is interesting about {topic}? Answer {reader}."),
    (1, "Why is {topic} important to {hero}?"),
    (2, "How do I {task}? I am {hero} and I live {place}."),
    (1, "Give me three tips to {task}."),
    (2, "Write a short dialogue between {people} about {topic}."),
    (1, "Write a dialogue between {people} who want to {task} {place}."),
    (1, "Describe {hero} {place} in a few sentences."),
    (1, "Write a letter from {hero} to {hero2} about {topic}."),
)


def prompts(count: int, seed: int) -> list[str]:
    """`count` distinct prompts; the same seed gives the same ones in the same order."""
    draw = random.Random(seed)
    lists = {
        "hero": HEROES, "hero2": HEROES, "deed": DEEDS, "place": PLACES,
        "topic": TOPICS, "reader": READERS, "task": TASKS, "people": PEOPLE,
    }  # fmt: skip
    words = {name: " ".join(text.split()).split(" | ") for name, text in lists.items()}
    weights, forms = zip(*TEMPLATES)
    seen: dict[str, None] = {}
    while len(seen) < count:
        form = draw.choices(forms, weights)[0]
        seen[form.format(**{name: draw.choice(options) for name, options in words.items()})] = None
    return list(seen)
