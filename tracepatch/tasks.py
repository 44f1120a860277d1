"""Prompts of well-known tasks, made for a tokenizer: pairs with named spans, by a count and a seed.

Each function takes the tokenizer of the model, keeps the words that can do what the task asks of them (an answer must
be one token; a word that is only read may be several), and says in words where a tokenizer cannot express the task.
The same seed gives the same pairs, as long as the same words fit.

* ``ioi``: who is given the bag?
* ``greater_than``: which years end later than they began?
* ``docstring``: which argument is described next?
* ``facts``: capitals, languages, landmarks.
* ``sentiment``: is the movie great or terrible?
* ``occupation``: does the nurse go on as *she* or as *he*?
* ``induction``: what followed this word before?
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from tracepatch import words
from tracepatch.errors import PromptError, listing
from tracepatch.prompts import Pairs
from tracepatch.spans import characters
from tracepatch.templates import Template
from tracepatch.tokens import answer_id, one_token, require_tokenizer

Relation: TypeAlias = Literal["capital", "language", "landmark"]
IOI = Template("When {first} and {second} went to the {place}, {subject} gave the {thing} to")
YEARS = Template("The {event} lasted from the year {century}{year} to the year {century}")
DOCSTRING = Template(
    "def {function}(self, {first}, {second}, {third}, {fourth}, {fifth}):\n"
    '    """{summary}\n\n    :param {second}: {about}\n    :param {third}: {about_too}\n    :param'
)
RELATIONS: dict[Relation, tuple[Template, tuple[tuple[str, str], ...]]] = {
    "capital": (Template("The capital of {subject} is the city of"), words.CAPITALS),
    "language": (Template("The language that most people in {subject} speak is"), words.LANGUAGES),
    "landmark": (Template("{subject} is in the city of"), words.LANDMARKS),
}
MOVIE = Template("I thought this movie was {adjective}, I {verb} it.\n{conclusion:Conclusion}: This movie is")
SAID = ("said that", "whispered that", "wanted to say that", "was late because", "was happy because", "laughed because")
WORK = Template("The {who} {did}")


def ioi(
    tokenizer: PreTrainedTokenizerBase, count: int = 8, seed: int = 0, corruption: Literal["swap", "abc"] = "swap"
) -> Pairs:
    """Indirect objects: *When John and Mary went to the store, John gave the bag to* → *Mary* (Wang et al. 2022).

    The subject is named second and first in turn (ABBA, BABA).

    Args:
        tokenizer: Of the model.
        count: How many pairs; rounded up to an even number where they are used in both roles.
        seed: Of the choice of words.
        corruption: ``"swap"``: the subject is the other name, which exchanges the answers, and every pair is used in
            both roles. ``"abc"``: three other names, so that no name is right.

    Raises:
        PromptError: Too few of the words are one token, or there is no such corruption.
    """
    _require_choice("corruption", corruption, ("swap", "abc"))
    needed = 2 if corruption == "swap" else 5
    names, places, things = _fitting(
        tokenizer,
        "IOI",
        IOI,
        names=(words.NAMES, needed),
        places=(words.PLACES, 1),
        objects=(words.OBJECTS, 1),
    )
    rng, clean, corrupted, answer, wrong = random.Random(seed), [], [], [], []
    for number in range((count + 1) // 2 if corruption == "swap" else count):
        first, second, *others = rng.sample(names, needed)
        subject, other = (second, first) if number % 2 == 0 else (first, second)
        row = {"first": first, "second": second, "place": rng.choice(places), "thing": rng.choice(things)}
        clean.append({**row, "subject": subject})
        if corruption == "swap":
            corrupted.append({"subject": other})
        else:
            corrupted.append(dict(zip(("first", "second", "subject"), others, strict=True)))
        answer.append(f" {other}")
        wrong.append(f" {subject}")
    name = f"IOI, {len(names)} of {len(words.NAMES)} names are one token here"
    pairs = IOI.pairs(clean, corrupted, answer, wrong, name=name, seed=seed)
    return pairs.both_roles() if corruption == "swap" else pairs


def greater_than(tokenizer: PreTrainedTokenizerBase, count: int = 8, seed: int = 0) -> Pairs:
    """Years: *The war lasted from the year 1732 to the year 17* → *33* to *99* (Hanna et al. 2023, arXiv:2305.00586).

    Every later year of the century is an answer, every other a wrong one; the corrupted prompt begins in 01. Where the
    tokenizer has single digits, the answer is the first of the two, and years that end in 9 are asked about.

    Args:
        tokenizer: Of the model.
        count: How many pairs.
        seed: Of the choice of events and years.

    Raises:
        PromptError: The tokenizer splits years in another way.
    """
    _require_known(tokenizer, "greater-than", YEARS.fill(event=words.EVENTS[0], century="17", year="32").text)
    centuries = [str(century) for century in range(11, 18)]
    found = {width: {c: years for c in centuries if (years := _years(tokenizer, c, width))} for width in (2, 1)}
    width = next((width for width, usable in found.items() if usable), 0)
    if not width:
        pieces = " ".join(repr(tokenizer.decode([i])) for i in _ids(tokenizer, "the year 1732"))
        raise PromptError(
            "The task greater-than cannot be written for this tokenizer. It needs years whose last two digits are one "
            f"token, or one each.\n  'the year 1732' is {pieces}\nUse a model that splits numbers in another way."
        )
    rng, rows, answer, wrong = random.Random(seed), [], [], []
    every = [str(n).zfill(width) for n in range(10**width)]
    for _ in range(count):
        century = rng.choice(list(found[width]))
        year = f"{rng.choice(found[width][century]):02d}"
        rows.append({"event": rng.choice(words.EVENTS), "century": century, "year": year})
        answer.append([n for n in every if n > year[:width]])
        wrong.append([n for n in every if n <= year[:width]])
    return YEARS.pairs(rows, {"year": "01"}, answer, wrong, name="greater-than", seed=seed)


def docstring(
    tokenizer: PreTrainedTokenizerBase, count: int = 8, seed: int = 0, corruption: Literal["order", "random"] = "order"
) -> Pairs:
    """Docstrings: which argument of *def port(self, load, size, files, last, …)* is described after *size*, *files*?

    After Heimersheim & Janiak (2023), *A circuit for Python docstrings in a 4-layer attention-only transformer*.

    Args:
        tokenizer: Of the model.
        count: How many pairs; rounded up to an even number where they are used in both roles.
        seed: Of the choice of words.
        corruption: ``"order"``: the last two arguments of the definition are exchanged, and so are the answers; every
            pair is used in both roles. ``"random"``: the definition has other arguments, so that none is right.

    Raises:
        PromptError: Too few of the words are one token, or there is no such corruption.
    """
    _require_choice("corruption", corruption, ("order", "random"))
    (names,) = _fitting(tokenizer, "docstring", DOCSTRING, parameters=(words.PARAMETERS, 11))
    rng, clean, corrupted, answer, wrong = random.Random(seed), [], [], [], []
    slots = ("function", "first", "second", "third", "fourth", "fifth", "summary", "about", "about_too")
    for _ in range((count + 1) // 2 if corruption == "order" else count):
        row = dict(zip(slots, rng.sample(names, len(slots)), strict=True))
        clean.append(row)
        left = [name for name in names if name not in row.values()]
        changed = {"fourth": row["fifth"], "fifth": row["fourth"]}
        corrupted.append(changed if corruption == "order" else dict(zip(changed, rng.sample(left, 2), strict=True)))
        answer.append(f" {row['fourth']}")
        wrong.append(f" {row['fifth']}")
    pairs = DOCSTRING.pairs(clean, corrupted, answer, wrong, name="docstring", seed=seed)
    return pairs.both_roles() if corruption == "order" else pairs


def facts(tokenizer: PreTrainedTokenizerBase, count: int = 8, seed: int = 0, relation: Relation = "capital") -> Pairs:
    """Facts: *The capital of France is the city of* → *Paris*; in the corrupted prompt it is another country.

    The subject may be several tokens; subjects of other lengths are aligned by their last ones. Every pair is used in
    both roles.

    Args:
        tokenizer: Of the model.
        count: How many pairs; rounded up to an even number.
        seed: Of the choice of facts.
        relation: ``"capital"``, ``"language"`` or ``"landmark"``.

    Raises:
        PromptError: Fewer than two facts have an answer of one token, or there is no such relation.
    """
    _require_choice("relation", relation, tuple(RELATIONS))
    template, known = RELATIONS[relation]
    fitting = _kept(tokenizer, [answer for _, answer in known])
    usable = [(subject, answer) for subject, answer in known if answer in fitting]
    if len({answer for _, answer in usable}) < 2:
        raise PromptError(
            _too_few(f"facts ({relation})", [f"answers: {len(usable)} of {len(known)} are one token, 2 are needed"])
        )
    _require_known(tokenizer, f"facts ({relation})", template.fill(subject=usable[0][0]).text)
    rng, clean, corrupted, answers, wrong = random.Random(seed), [], [], [], []
    for _ in range((count + 1) // 2):
        subject, answer = rng.choice(usable)
        other, its_answer = rng.choice([fact for fact in usable if fact[1] != answer])
        clean.append({"subject": subject})
        corrupted.append({"subject": other})
        answers.append(f" {answer}")
        wrong.append(f" {its_answer}")
    return template.pairs(clean, corrupted, answers, wrong, name=f"facts ({relation})", seed=seed).both_roles()


def sentiment(tokenizer: PreTrainedTokenizerBase, count: int = 8, seed: int = 0) -> Pairs:
    """Reviews: *I thought this movie was perfect, I loved it. Conclusion: This movie is* → *great*, not *terrible*.

    After the toy movie reviews of Tigges et al. (2023), arXiv:2310.15154. The corrupted prompt blames; every pair is
    used in both roles. All adjectives of the other side that are one token are answers.

    Args:
        tokenizer: Of the model.
        count: How many pairs; rounded up to an even number.
        seed: Of the choice of words.

    Raises:
        PromptError: Too few of the words are one token.
    """
    praise, blame, liked, loathed = _fitting(
        tokenizer,
        "sentiment",
        MOVIE,
        praise=(words.PRAISE, 2),
        blame=(words.BLAME, 2),
        liked=(words.LIKED, 1),
        loathed=(words.LOATHED, 1),
    )
    rng, clean, corrupted, answer, wrong = random.Random(seed), [], [], [], []
    for _ in range((count + 1) // 2):
        good, bad = rng.choice(praise), rng.choice(blame)
        clean.append({"adjective": good, "verb": rng.choice(liked)})
        corrupted.append({"adjective": bad, "verb": rng.choice(loathed)})
        answer.append([f" {word}" for word in praise if word != good])
        wrong.append([f" {word}" for word in blame if word != bad])
    return MOVIE.pairs(clean, corrupted, answer, wrong, name="sentiment", seed=seed).both_roles()


def occupation(tokenizer: PreTrainedTokenizerBase, count: int = 8, seed: int = 0) -> Pairs:
    """Gender and occupation: *The nurse said that* → *she*; corrupted it is *the man* (Vig et al. 2020).

    The answer is the pronoun that goes with the occupation by the stereotype, the wrong one that of the other gender,
    which the corrupted prompt names. Occupations may be several tokens.

    Args:
        tokenizer: Of the model.
        count: How many pairs, of stereotypes of both genders in turn.
        seed: Of the choice of words.

    Raises:
        PromptError: A pronoun is not one token.
    """
    pronouns = _kept(tokenizer, ["she", "he"])
    if len(pronouns) < 2:
        raise PromptError(
            _too_few("occupation", [f"pronouns: {len(pronouns)} of 2 (she, he) are one token, 2 are needed"])
        )
    _require_known(tokenizer, "occupation", WORK.fill(who="man", did=SAID[0]).text)
    rng, clean, corrupted, answer, wrong = random.Random(seed), [], [], [], []
    for number in range(count):
        female = number % 2 == 0
        clean.append({"who": rng.choice(words.OF_WOMEN if female else words.OF_MEN), "did": rng.choice(SAID)})
        corrupted.append({"who": "man" if female else "woman"})
        answer.append(" she" if female else " he")
        wrong.append(" he" if female else " she")
    return WORK.pairs(clean, corrupted, answer, wrong, name="occupation", seed=seed)


def induction(
    tokenizer: PreTrainedTokenizerBase,
    count: int = 8,
    seed: int = 0,
    corruption: Literal["AB", "BA", "BB", "BC"] = "BA",
    length: int = 12,
) -> Pairs:
    """Induction: random words, *… A x … B y … A* → *x*, what followed the last word before (Olsson et al. 2022).

    The letters of a corruption say what stands before x, and at the end, where the clean prompt has A and A:

    * ``"AB"``: the last word is B, so that y is right: another question (queries differ).
    * ``"BA"``: A and B have changed places, so that y is right: another answer to the same question (keys differ).
    * ``"BB"``: both; x is right again: the same behaviour of other words.
    * ``"BC"``: A and B have changed places and the last word is new, so that nothing is right.

    A and B, x and y come in either order.

    Args:
        tokenizer: Of the model.
        count: How many pairs.
        seed: Of the choice of words and places.
        corruption: What is exchanged.
        length: Words of a prompt before its last one, at least 4.

    Raises:
        PromptError: Too few of the words are one token, or there is no such corruption.
    """
    _require_choice("corruption", corruption, ("AB", "BA", "BB", "BC"))
    if length < 4:
        raise PromptError(f"length is the number of words before the last one, at least 4, not {length!r}.")
    (nouns,) = _fitting(tokenizer, "induction", None, words=(words.NOUNS, length + 1))
    rng, clean, corrupted, answer, wrong = random.Random(seed), [], [], [], []
    slots = [f"w{i}" for i in range(length)]
    for _ in range(count):
        *drawn, new = rng.sample(nouns, length + 1)
        one, two = sorted(rng.sample(range(length - 2), 2))
        a, b = rng.choice([(one, two + 1), (two + 1, one)])  # each is followed by a word of its own
        row = dict(zip(slots, drawn, strict=True))
        exchanged = {slots[a]: drawn[b], slots[b]: drawn[a]}
        last = {"A": drawn[a], "B": drawn[b], "C": new}[corruption[1]]
        clean.append({**row, "last": drawn[a]})
        corrupted.append({**({} if corruption[0] == "A" else exchanged), "last": last})
        answer.append(f" {drawn[a + 1]}")
        wrong.append(f" {drawn[b + 1]}")
    template = Template(" ".join(f"{{{slot}}}" for slot in (*slots, "last")))
    return template.pairs(clean, corrupted, answer, wrong, name=f"induction ({corruption})", seed=seed)


# ---------------------------------------------------------------------------------------------------- what fits


def _kept(tokenizer: PreTrainedTokenizerBase, given: Sequence[str]) -> list[str]:
    """The words that are one token behind another word."""
    return [word.strip() for word in one_token(tokenizer, (f" {word}" for word in given), after="the")]


def _fitting(
    tokenizer: PreTrainedTokenizerBase, task: str, template: Template | None, **needs: tuple[Sequence[str], int]
) -> list[list[str]]:
    """The words of each kind that are one token.

    Args:
        tokenizer: Of the model.
        task: What the task is called.
        template: Whose own words the tokenizer must have.
        **needs: Kind → the words, and how many of them are needed.

    Raises:
        PromptError: Too few are left; all kinds of which there are too few are named.
    """
    kept = {kind: _kept(tokenizer, given) for kind, (given, _) in needs.items()}
    short = [
        f"{kind}: {len(kept[kind])} of {len(given)} are one token, {needed} {'is' if needed == 1 else 'are'} needed"
        for kind, (given, needed) in needs.items()
        if len(kept[kind]) < needed
    ]
    if short:
        raise PromptError(_too_few(task, short))
    if template is not None:
        word = next(iter(kept.values()))[0]
        filled = template.fill(**{slot: word for slot in template.slots if slot not in template.defaults})
        _require_known(tokenizer, task, filled.text)
    return list(kept.values())


def _too_few(task: str, short: Sequence[str]) -> str:
    return (
        f"The task {task} cannot be written for this tokenizer.\n{listing(short)}\nUse a model with a larger "
        "vocabulary, or write pairs of your own with tp.Template."
    )


def _require_known(tokenizer: PreTrainedTokenizerBase, task: str, text: str) -> None:
    """Refuses a task whose text has words that are not in the vocabulary."""
    require_tokenizer(tokenizer)
    ids = _ids(tokenizer, text)
    if tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids:
        return
    places = characters(tokenizer, text) or [(0, len(text))] * len(ids)
    unknown = [text[a:b].strip() for one, (a, b) in zip(ids, places, strict=True) if one == tokenizer.unk_token_id]
    raise PromptError(_too_few(task, [f"not in its vocabulary: {', '.join(map(repr, dict.fromkeys(unknown)))}"]))


def _require_choice(name: str, given: Any, choices: Sequence[str]) -> None:
    if given not in choices:
        raise PromptError(f"{name} is one of {', '.join(map(repr, choices))}, not {given!r}.")


def _years(tokenizer: PreTrainedTokenizerBase, century: str, width: int) -> list[int]:
    """Years of a century that are split into its two digits and tokens of so many digits, as their answers are."""
    begun = f"The {words.EVENTS[0]} lasted from the year {century}"
    ids = _ids(tokenizer, begun)
    parts = [str(n).zfill(width) for n in range(10**width)]
    tokens = {part: answer_id(tokenizer, part, begun) for part in parts}
    if None in tokens.values():
        return []

    def split(year: int) -> bool:
        text = f"{year:02d}"
        wanted = [tokens[text[i : i + width]] for i in range(0, 2, width)]
        return _ids(tokenizer, begun + text) == ids + wanted

    usable = [year for year in (range(2, 99) if width == 2 else range(19, 90, 10)) if split(year)]
    return usable if split(1) else []


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
