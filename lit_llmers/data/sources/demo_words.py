"""The words of the generated catalogue."""

from typing import NamedTuple


class Category(NamedTuple):
    department: str
    name: str
    noun: str
    title_word: str


class Theme(NamedTuple):
    name: str
    phrase: str
    nouns: tuple[str, ...]


class Style(NamedTuple):
    phrase: str
    adjectives: tuple[str, ...]


CATEGORIES = (
    Category("Books", "Mystery", "mystery novel", "Suspicion"),
    Category("Books", "Fantasy", "fantasy novel", "Enchantment"),
    Category("Books", "Science Fiction", "science fiction novel", "Tomorrow"),
    Category("Books", "History", "history book", "Ages"),
    Category("Books", "Cookery", "cookery book", "Flavour"),
    Category("Books", "Travel", "travel guide", "Departure"),
    Category("Games", "Board Games", "board game", "Strategy"),
    Category("Games", "Puzzles", "jigsaw puzzle", "Pieces"),
    Category("Games", "Card Games", "card game", "Chance"),
    Category("Music", "Jazz", "jazz record", "Swing"),
    Category("Music", "Folk", "folk record", "Ballads"),
    Category("Films", "Documentary", "documentary film", "Witness"),
    Category("Films", "Animation", "animated film", "Wonder"),
    Category("Hobby", "Model Kits", "model kit", "Assembly"),
    Category("Hobby", "Gardening", "gardening set", "Growth"),
    Category("Hobby", "Painting", "painting set", "Colour"),
)

# neighbours in this ring are alike: an interest drifts from one to the next
THEMES = (
    Theme("Sea", "the open sea and its ships", ("Harbour", "Tide", "Lighthouse", "Anchor", "Voyage")),
    Theme("Islands", "far islands and their shores", ("Island", "Lagoon", "Reef", "Shore", "Castaway")),
    Theme("Jungle", "the jungle and its beasts", ("Jungle", "Tiger", "Vine", "Canopy", "Parrot")),
    Theme("Forest", "deep forests and those who live there", ("Forest", "Oak", "Clearing", "Fox", "Fern")),
    Theme("Mountains", "high mountains and hard climbs", ("Summit", "Glacier", "Ridge", "Avalanche", "Eagle")),
    Theme("Winter", "snow, ice and long nights", ("Winter", "Frost", "Sledge", "Snowfall", "Icicle")),
    Theme("Stars", "the night sky and the stars", ("Comet", "Observatory", "Orbit", "Galaxy", "Eclipse")),
    Theme("Machines", "engines, gears and inventors", ("Engine", "Clockwork", "Inventor", "Piston", "Automaton")),
    Theme("City", "streets and roofs of the big city", ("Boulevard", "Rooftop", "Tramway", "Arcade", "Avenue")),
    Theme("Theatre", "actors, stages and masks", ("Curtain", "Mask", "Actor", "Stage", "Overture")),
    Theme("Court", "kings, queens and intrigue at court", ("Crown", "Castle", "Queen", "Throne", "Duel")),
    Theme("Desert", "sand, caravans and lost cities", ("Desert", "Caravan", "Oasis", "Dune", "Mirage")),
    Theme("Rivers", "rivers, boats and mills", ("River", "Ferry", "Watermill", "Delta", "Bridge")),
    Theme("Coast", "fishing villages and storms", ("Cliff", "Storm", "Fisherman", "Pier", "Gull")),
)

STYLES = (
    Style("a quiet", ("Quiet", "Silent", "Gentle", "Calm")),
    Style("a dark", ("Dark", "Grim", "Shadowed", "Haunted")),
    Style("a playful", ("Playful", "Merry", "Dancing", "Laughing")),
    Style("an epic", ("Great", "Endless", "Mighty", "Boundless")),
    Style("a witty", ("Clever", "Curious", "Crooked", "Sly")),
    Style("a tender", ("Tender", "Beloved", "Lonely", "Faithful")),
    Style("a lavish", ("Golden", "Gilded", "Velvet", "Crystal")),
    Style("an austere", ("Bare", "Iron", "Stone", "Grey")),
    Style("a strange", ("Strange", "Hidden", "Forgotten", "Secret")),
    Style("a bold", ("Red", "Burning", "Wild", "Reckless")),
)

MAKERS = (
    "Alder & Finch", "Brightwater", "Casimir House", "Dunmore", "Elmfield", "Ferrant Brothers", "Gable & Rook",
    "Hollis", "Ivory Lane", "Juniper Press", "Kestrel", "Larkspur", "Marlow & Daughter", "Northgate",
    "Orchard Street", "Pemberly", "Quill & Sons", "Rosewood", "Saltmarsh", "Thornbury", "Umber Works", "Vesper",
    "Whitlock", "Yarrow", "Zephyr", "Ashgrove", "Bellweather", "Copperfield Lane", "Driftwood", "Everhart",
    "Foxglove", "Greystone",
)  # fmt: skip
