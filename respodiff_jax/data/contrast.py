"""English phrases for contrast prompts, from which adapters learn to read prompts.

PEOPLE are phrases for people, with or without a gender or skin tone; ADJECTIVES say neither. THINGS
are without people; some contain words that also name people or a race.
"""

TEMPLATES = (
    "{a_subject}",
    "a photo of {a_subject}",
    "a picture of {a_subject}",
    "an image of {a_subject}",
    "a portrait of {a_subject}",
    "photo of {subject}",
    "{subject}",
)

_PROFESSIONS = (
    *("accountant", "actor", "architect", "artist", "astronaut", "athlete", "barber", "biologist"),
    *("bus driver", "butcher", "chef", "chemist", "coach", "dancer", "dentist", "detective"),
    *("economist", "electrician", "engineer", "farm worker", "firefighter", "fisher", "florist"),
    *("gardener", "historian", "interpreter", "journalist", "judge", "lifeguard", "locksmith"),
    *("mathematician", "midwife", "miner", "musician", "optician", "painter", "paramedic"),
    *("pharmacist", "photographer", "pilot", "plumber", "police officer", "politician"),
    *("professor", "psychologist", "reporter", "roofer", "sailor", "scientist", "shopkeeper"),
    *("singer", "social worker", "software engineer", "soldier", "surgeon", "taxi driver"),
    *("translator", "veterinarian", "waiter", "welder", "zookeeper"),
)
_GENERAL = ("person", "human", "face", "child", "teenager", "adult", "elderly person", "student")
_DOING = (
    *("person riding a bike", "person reading a book", "person walking a dog", "person cooking"),
    *("person with an umbrella", "person on a beach", "person playing tennis", "crowd of people"),
    *("group of friends", "couple at a table", "family on a sofa", "person in a suit"),
)
# People who are named, so that a group that these words do not belong to stays open.
_NAMED = tuple(
    f"{word} {person}"
    for number, word in enumerate(
        (
            *("woman", "female", "man", "male", "white-race", "black-race", "Asian-race"),
            *("light-skinned", "dark-skinned"),
        )
    )
    for person in _PROFESSIONS[number::9]
)
PEOPLE = (*_GENERAL, *_PROFESSIONS, *_DOING, "woman", "man", *_NAMED)

# Words before a person that name nobody's gender and no skin tone.
ADJECTIVES = (
    *("old", "tall", "blond", "happy", "red-haired", "busy", "young", "curly-haired", "famous"),
    *("white-haired", "strong", "sad", "kind", "short", "rich", "quiet", "brave", "clever"),
    *("friendly", "tired", "serious", "modern", "smiling", "local", "retired"),
)

THINGS = (
    *("cat", "dog", "bulldog", "horse", "cow", "sheep", "elephant", "giraffe", "zebra", "bear"),
    *("bird", "owl", "eagle", "parrot", "duck", "fish", "shark", "whale", "crab", "butterfly"),
    *("bee", "queen bee", "spider", "snake", "turtle", "frog", "lion", "tiger", "wolf", "fox"),
    *("apple", "banana", "orange", "pizza", "cake", "sandwich", "hot dog", "bowl of soup"),
    *("salad", "glass of wine", "cup of coffee", "bottle", "fork", "spoon", "plate of fruit"),
    *("car", "racing car", "bus", "train", "truck", "bicycle", "motorcycle", "boat", "ship"),
    *("airplane", "rocket", "fire hydrant", "traffic light", "stop sign", "parking meter"),
    *("house", "castle", "church", "bridge", "lighthouse", "tower", "city skyline", "street"),
    *("kitchen", "bathroom", "bedroom", "king-size bed", "living room", "chair", "table", "sofa"),
    *("lamp", "clock", "vase", "mirror", "toilet", "sink", "oven", "refrigerator", "microwave"),
    *("laptop", "keyboard", "phone", "television", "camera", "remote control", "printer"),
    *("book", "newspaper", "map", "painting of a flower", "guitar", "piano", "violin", "drum"),
    *("football", "tennis racket", "skateboard", "surfboard", "kite", "baseball bat", "snowman"),
    *("gingerbread man", "queen of spades", "manhole", "doll", "teddy bear", "robot", "statue"),
    *("scarecrow", "suitcase", "backpack", "handbag", "umbrella", "tie", "shoe", "hat", "dress"),
    *("mountain", "lake", "river", "waterfall", "forest", "desert", "beach", "island", "volcano"),
    *("sunset", "rainbow", "snowflake", "cloud", "moon", "tree", "rose", "sunflower", "cactus"),
    *("mushroom", "pumpkin", "carrot", "broccoli", "stack of books", "bowl of oranges"),
    *("knife", "gun", "bomb", "cigarette", "candle", "bottle of beer", "syringe"),
    *("white horse", "black cat", "black car", "white van", "African elephant"),
    *("abstract painting", "empty room", "landscape", "bouquet of flowers", "kettle", "toaster"),
)
