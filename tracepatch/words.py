"""The words that prompts of well-known tasks are made of: lists to choose from what a tokenizer has as one token."""

from __future__ import annotations

from typing import Final

NAMES: Final = tuple(
    """
    John Mary Tom James Dan Sean Mark Alice Robert Michael David William Richard Joseph Thomas Charles Daniel Matthew
    Anthony Steven Paul Andrew Kevin Brian George Edward Jason Ryan Jacob Eric Jonathan Stephen Justin Scott Brandon
    Benjamin Samuel Frank Jennifer Elizabeth Susan Jessica Sarah Karen Lisa Nancy Ashley Emily Michelle Laura Rebecca
    Rachel Anna Amy Kate Jane Emma
    """.split()  # noqa: SIM905
)
PLACES: Final = ("store", "park", "school", "office", "garden", "house", "station", "restaurant")
OBJECTS: Final = ("bag", "drink", "book", "ring", "ball", "snack", "key", "letter")
EVENTS: Final = (
    *(
        "war",
        "siege",
        "strike",
        "voyage",
        "dispute",
        "reign",
        "search",
        "trial",
        "project",
        "drought",
        "conflict",
        "tour",
    ),
    *("famine", "debate", "study", "march", "treaty", "plague", "rebellion", "friendship"),
)
NOUNS: Final = tuple(
    """
    apple river stone cloud tiger piano candle bridge forest silver window dragon pepper rocket island butter hammer
    orange mirror basket summer winter castle pencil rabbit coffee engine flower guitar helmet jacket lemon monkey
    needle ocean planet queen ribbon salad tunnel valley wagon yellow zebra anchor button carpet doctor table horse
    paper music glass bread chair train water light field mountain city dog cat tree door road ship star gold king
    """.split()  # noqa: SIM905
)
PARAMETERS: Final = tuple(
    """
    load size files last first model state old new count key data user result test project date image text line page
    message item action value source target node field index parent child method order event output input context mode
    option config path name content code filter group block rate shape host port start stop time
    """.split()  # noqa: SIM905
)
CAPITALS: Final = (
    *(("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Germany", "Berlin"), ("Austria", "Vienna")),
    *(("England", "London"), ("Ireland", "Dublin"), ("Portugal", "Lisbon"), ("Greece", "Athens"), ("Poland", "Warsaw")),
    *(
        ("Hungary", "Budapest"),
        ("Russia", "Moscow"),
        ("Norway", "Oslo"),
        ("Sweden", "Stockholm"),
        ("Finland", "Helsinki"),
    ),
    *(("Denmark", "Copenhagen"), ("Belgium", "Brussels"), ("Egypt", "Cairo"), ("Iraq", "Baghdad"), ("Iran", "Tehran")),
    *(("Syria", "Damascus"), ("Lebanon", "Beirut"), ("Japan", "Tokyo"), ("China", "Beijing"), ("South Korea", "Seoul")),
    *(("Thailand", "Bangkok"), ("Vietnam", "Hanoi"), ("Cuba", "Havana"), ("Peru", "Lima"), ("Canada", "Ottawa")),
    *(
        ("Kenya", "Nairobi"),
        ("Ukraine", "Kiev"),
        ("Serbia", "Belgrade"),
        ("Bulgaria", "Sofia"),
        ("Romania", "Bucharest"),
    ),
    *(("the Czech Republic", "Prague"), ("Afghanistan", "Kabul"), ("Turkey", "Ankara"), ("Libya", "Tripoli")),
)
LANGUAGES: Final = (
    *(("Paris", "French"), ("Rome", "Italian"), ("Madrid", "Spanish"), ("Berlin", "German"), ("London", "English")),
    *(
        ("Lisbon", "Portuguese"),
        ("Athens", "Greek"),
        ("Warsaw", "Polish"),
        ("Moscow", "Russian"),
        ("Oslo", "Norwegian"),
    ),
    *(("Stockholm", "Swedish"), ("Copenhagen", "Danish"), ("Amsterdam", "Dutch"), ("Cairo", "Arabic")),
    *(
        ("Tokyo", "Japanese"),
        ("Beijing", "Chinese"),
        ("Seoul", "Korean"),
        ("Istanbul", "Turkish"),
        ("Tel Aviv", "Hebrew"),
    ),
)
LANDMARKS: Final = (
    *(
        ("The Eiffel Tower", "Paris"),
        ("The Colosseum", "Rome"),
        ("Big Ben", "London"),
        ("The Brandenburg Gate", "Berlin"),
    ),
    *(
        ("The Kremlin", "Moscow"),
        ("The Parthenon", "Athens"),
        ("The Prado", "Madrid"),
        ("The Forbidden City", "Beijing"),
    ),
    *(
        ("The Statue of Liberty", "New York"),
        ("The Space Needle", "Seattle"),
        ("The Golden Gate Bridge", "San Francisco"),
    ),
    *(("The White House", "Washington"), ("The CN Tower", "Toronto"), ("The Hagia Sophia", "Istanbul")),
    *(("The Little Mermaid", "Copenhagen"), ("The Charles Bridge", "Prague"), ("The Willis Tower", "Chicago")),
)
PRAISE: Final = (
    *("perfect", "fantastic", "delightful", "good", "amazing", "great", "remarkable", "incredible", "extraordinary"),
    *("wonderful", "brilliant", "excellent", "beautiful", "superb"),
)
BLAME: Final = (
    *("dreadful", "bad", "disappointing", "horrible", "terrible", "awful", "boring", "dull", "disgusting"),
    *("miserable", "pathetic", "weak", "stupid", "ugly"),
)
LIKED: Final = ("enjoyed", "loved", "liked", "adored", "admired", "appreciated")
LOATHED: Final = ("hated", "disliked", "despised", "regretted", "detested", "loathed")
OF_WOMEN: Final = (  # occupations, by the gender that English text mostly gives them
    *("nurse", "receptionist", "nanny", "librarian", "housekeeper", "hairdresser", "secretary", "dancer"),
    *("maid", "ballerina", "stylist", "dietitian", "homemaker", "babysitter", "midwife", "florist"),
)
OF_MEN: Final = (
    *("engineer", "carpenter", "plumber", "mechanic", "soldier", "boss", "programmer", "farmer", "firefighter"),
    *("pilot", "captain", "electrician", "butcher", "blacksmith", "coach", "sheriff", "architect", "banker"),
)
