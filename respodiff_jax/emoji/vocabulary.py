"""The vocabulary of Emoji World: the words of its captions and the Noto artwork of each.

Artwork names are the `short_name`s in `emoji.json` of the npm package `emoji-datasource-google`.
Emoji World has no yellow people: every person has one of Fitzpatrick's five skin tones.
"""

GENDERS = ("woman", "man")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
TONE_GROUPS = ("light", "medium", "dark")
TONE_GROUP_OF = (0, 0, 1, 2, 2)  # for each tone, the index of its group

# word in captions -> artwork (woman, man)
PROFESSIONS = {
    "farmer": ("female-farmer", "male-farmer"),
    "cook": ("female-cook", "male-cook"),
    "student": ("female-student", "male-student"),
    "singer": ("female-singer", "male-singer"),
    "artist": ("female-artist", "male-artist"),
    "teacher": ("female-teacher", "male-teacher"),
    "welder": ("female-factory-worker", "male-factory-worker"),
    "developer": ("female-technologist", "male-technologist"),
    "office worker": ("female-office-worker", "male-office-worker"),
    "mechanic": ("female-mechanic", "male-mechanic"),
    "scientist": ("female-scientist", "male-scientist"),
    "astronaut": ("female-astronaut", "male-astronaut"),
    "firefighter": ("female-firefighter", "male-firefighter"),
    "doctor": ("female-doctor", "male-doctor"),
    "judge": ("female-judge", "male-judge"),
    "pilot": ("female-pilot", "male-pilot"),
    "police officer": ("female-police-officer", "male-police-officer"),
    "construction worker": ("female-construction-worker", "male-construction-worker"),
    "juggler": ("woman-juggling", "man-juggling"),
    "waiter": ("woman_in_tuxedo", "man_in_tuxedo"),
}

# words after the person, "a woman running" -> artwork (woman, man)
ACTIVITIES = {
    "presenting": ("woman-tipping-hand", "man-tipping-hand"),
    "saying no": ("woman-gesturing-no", "man-gesturing-no"),
    "stretching": ("woman-gesturing-ok", "man-gesturing-ok"),
    "bowing": ("woman-bowing", "man-bowing"),
    "raising a hand": ("woman-raising-hand", "man-raising-hand"),
    "frowning": ("woman-frowning", "man-frowning"),
    "crossing arms": ("woman-pouting", "man-pouting"),
    "facepalming": ("woman-facepalming", "man-facepalming"),
    "shrugging": ("woman-shrugging", "man-shrugging"),
    "getting a massage": ("woman-getting-massage", "man-getting-massage"),
    "getting a haircut": ("woman-getting-haircut", "man-getting-haircut"),
    "running": ("woman-running", "man-running"),
    "walking": ("woman-walking", "man-walking"),
    "riding a bike": ("woman-biking", "man-biking"),
    "lifting weights": ("woman-lifting-weights", "man-lifting-weights"),
    "playing basketball": ("woman-bouncing-ball", "man-bouncing-ball"),
    "standing": ("woman_standing", "man_standing"),
    "meditating": ("woman_in_lotus_position", "man_in_lotus_position"),
    "in a sauna": ("woman_in_steamy_room", "man_in_steamy_room"),
    "wearing a veil": ("woman_with_veil", "man_with_veil"),
    "dressed as a wizard": ("female_mage", "male_mage"),
    "dressed as a vampire": ("female_vampire", "male_vampire"),
}

# word before the person, "a blond woman"; "" is the plain face -> artwork (woman, man)
LOOKS = {
    "": ("woman", "man"),
    "blond": ("blond-haired-woman", "blond-haired-man"),
    "red-haired": ("red_haired_woman", "red_haired_man"),
    "curly-haired": ("curly_haired_woman", "curly_haired_man"),
    "white-haired": ("white_haired_woman", "white_haired_man"),
    "old": ("older_woman", "older_man"),
}

# unsafe object -> (artwork, concept it belongs to)
UNSAFE = {
    "knife": ("hocho", "violence"),
    "gun": ("gun", "violence"),
    "bomb": ("bomb", "violence"),
    "drop of blood": ("drop_of_blood", "violence"),
    "cigarette": ("smoking", "smoking"),
}
UNSAFE_CONCEPTS = ("violence", "smoking")
# unsafe concept -> as it stands before "photo"
UNSAFE_ADJECTIVES = {"violence": "violent", "smoking": "smoking"}
# unsafe object -> the ways in which captions name it after a subject
UNSAFE_PHRASES = {
    "knife": ("with a knife", "and a knife"),
    "gun": ("with a gun", "and a gun"),
    "bomb": ("with a bomb", "and a bomb"),
    "drop of blood": ("with a drop of blood", "with blood"),
    "cigarette": ("with a cigarette", "smoking a cigarette"),
}

# Artwork of things. Captions name a thing by its artwork's name, with spaces.
_THINGS = """
rat ox leopard ram goat sheep elephant koala poodle camel mouse cow tiger rabbit cat horse dog pig
hamster wolf bear chipmunk bat deer gorilla rhinoceros hedgehog kangaroo llama hippopotamus raccoon
badger mammoth sloth otter orangutan skunk beaver bison moose donkey crocodile snake turtle lizard
sauropod octopus shell fish blowfish dolphin whale crab shark shrimp squid lobster seal coral
jellyfish snail ant bee ladybug spider scorpion butterfly mosquito beetle rooster chicken bird
penguin turkey eagle duck owl peacock parrot swan dodo flamingo feather frog seedling cactus
mushroom maple_leaf tulip rose hibiscus sunflower bouquet hyacinth tomato grapes melon watermelon
tangerine lemon banana pineapple apple pear peach cherries strawberry kiwifruit coconut mango
blueberries chestnut corn eggplant avocado cucumber potato carrot peanuts broccoli garlic onion
hotdog taco burrito hamburger pizza bread fries popcorn croissant pancakes pretzel sandwich waffle
butter falafel ramen spaghetti sushi dumpling doughnut cookie candy lollipop cake pie cupcake tea
sake beer teapot rocket helicopter parachute bus ambulance taxi car tractor scooter skateboard
train tram ship canoe anchor house hospital school factory stadium hut volcano mountain camping
desert_island rainbow tornado cloud star snowflake fire guitar trumpet violin saxophone banjo
accordion microphone headphones radio camera tv bulb candle soccer baseball basketball football
tennis bowling golf ski sled kite yo-yo jigsaw dart gift balloon key lock bell book books scroll
newspaper briefcase scissors pushpin hammer wrench screwdriver axe ladder magnet gear umbrella
crown necktie jeans dress kimono purse boot sandal lipstick ring socks scarf gloves door toilet
bathtub bed chair broom bucket soap toothbrush telescope microscope syringe pill stethoscope
moneybag coin hourglass watch trophy medal robot_face ghost alien skull snowman teddy_bear
crystal_ball
"""
# Artwork of things with the words that captions have for it, where these differ.
_RENAMED = """
panda_face=panda lion_face=lion fox_face=fox unicorn_face=unicorn giraffe_face=giraffe
zebra_face=zebra polar_bear dragon_face=dragon t-rex=dinosaur fried_egg cheese_wedge=cheese
birthday=birthday_cake icecream=ice_cream coffee=cup_of_coffee wine_glass=glass_of_wine
evergreen_tree=pine_tree deciduous_tree=tree palm_tree four_leaf_clover=clover christmas_tree
jack_o_lantern=pumpkin_lantern airplane bike=bicycle fire_engine=fire_truck racing_car hot_pepper
european_castle=castle desktop_computer phone=telephone iphone=phone alarm_clock sun_with_face=sun
crescent_moon=moon earth_africa=earth beach_with_umbrella=beach statue_of_liberty=statue sunrise
cityscape=city night_with_stars=night_sky ferris_wheel art=palette drum_with_drumsticks=drum heart
"""
THINGS = {name.replace("_", " ").removesuffix(" face"): name for name in _THINGS.split()}
THINGS |= {
    (words or name).replace("_", " "): name
    for name, _, words in (item.partition("=") for item in _RENAMED.split())
}
