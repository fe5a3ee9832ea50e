"""Word lists shared by the generators. Plain lower-case ASCII words and first names."""
# ruff: noqa: E501, SIM905

from __future__ import annotations

import random

WORDS: tuple[str, ...] = tuple(
    """
    apple arrow autumn bacon badge baker ball banana barn basket bean bear beetle bell berry bird blanket boat
    bottle branch bread breeze bridge brother brush bucket butter button cabin cable camel camera candle canyon
    carpet carrot castle cat cedar chair cheese cherry circle city cloud clover coat coffee comet copper corner cotton
    cousin cradle crayon cricket crown cup curtain dance desert dinner doctor dog dolphin donkey door dragon dream
    drum duck eagle earth elbow engine evening eye falcon farmer feather fence fern finger fire flag floor flower
    flute forest fork fountain fox friend frog garden gate ghost ginger glass glove goat gold grape grass guitar
    hammer harbor hat hawk hazel heart helmet hill honey horse house ice igloo insect iron island ivory jacket
    jaguar jar jelly jewel juice jungle kettle key king kitchen kite kitten knife ladder lake lamp lantern leaf
    lemon letter library lion lizard lobster lock lunch machine magnet maple market meadow melon metal milk mirror
    money monkey moon morning moss mountain mouse museum music nail napkin needle nest night north nose notebook
    nurse oak ocean olive onion orange orchard otter oven owl oyster paint palace panda paper parrot peach pear
    pebble pencil pepper piano picture pigeon pillow pilot pirate planet plate pocket pond potato prince pumpkin
    puppet puzzle queen quilt rabbit radio rain raven ribbon rice ring river robin rocket roof rope rose saddle
    sailor salad salt sand scarf school seed shadow sheep ship shirt shoe silver sister sky snail snow soap
    soldier soup spider spoon spring squirrel stable star statue stone storm strawberry street summer sun swan
    sweater table tailor teacher temple tent thunder ticket tiger toast tomato tower train tree trumpet tulip
    tunnel turkey turtle umbrella uncle unicorn valley vase velvet village violin visit voyage wagon wallet
    walnut water weather whale wheat whistle willow window winter wizard wolf wool yard yarn yellow zebra zipper
    """.split()
)

NAMES: tuple[str, ...] = tuple(
    "Ada Ben Cleo Dan Eva Finn Gus Hana Ivan June Kai Lena Max Nora Omar Pia Quinn Rosa Sam Tess Uma Vera Will Zoe".split()
)

_ONSETS = "b c d f g h j k l m n p r s t v w z br cl dr fl gr pl st tr".split()
_NUCLEI = "a e i o u ai ee oo".split()
_CODAS = ["", "", "", "l", "m", "n", "r", "s", "t", "ck", "nd"]


def pseudo_word(rng: random.Random, syllables: int) -> str:
    """An invented, pronounceable word: letter tasks must be solved, not remembered."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS) for _ in range(syllables))


def any_word(rng: random.Random, max_letters: int = 12) -> str:
    """A listed word (two times in five) or an invented one, of at least three letters."""
    while True:
        word = rng.choice(WORDS) if rng.random() < 0.4 else pseudo_word(rng, rng.randint(1, 3))
        if 3 <= len(word) <= max_letters:
            return word
