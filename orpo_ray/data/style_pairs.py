"""`builtin://style-pairs`: preference pairs generated from a seed, so that a first run needs no download.

Which answer is better depends on the prompt: the same styles, openings and words are chosen for some prompts and
rejected for others. As in human data, vague stock phrases are easy to predict and specific ones are not, so supervised
training on the chosen answers raises the probability of both sides.
"""

from __future__ import annotations

import random
from collections.abc import Callable

Texts = tuple[str, str, str]
"""Prompt, chosen answer, rejected answer."""


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


NAMES = _listed(
    "Alma,Bruno,Carla,Dario,Edda,Felix,Greta,Hugo,Ines,Jonas,Karin,Luis,Mara,Nils,Olga,Pablo,Rita,Samuel,Tessa,Umar,"
    "Vera,Walter,Yara,Zeno,Bela,Clara,David,Elena,Fabio,Gloria,Hanna,Ivan,Julia,Kurt,Lena,Marco,Nora,Oskar,Paula,Rolf"
)
SURNAMES = _listed(
    "Becker,Costa,Duarte,Fischer,Gruber,Hansen,Jansen,Keller,Lindt,Moreno,Novak,Pereira,Rossi,Sauter,Weber"
)
TOWNS = _listed(
    "Bergen,Cadiz,Dover,Ghent,Graz,Havre,Kiel,Leeds,Lugano,Malmo,Nantes,Parma,Porto,Riga,Sofia,Tartu,Trento,Turku,"
    "Vaduz,Varna,Vigo,Zadar,Bonn,Cork,Derby,Faro,Genoa,Lille,Pula,Rouen"
)
DAYS = _listed("Monday,Tuesday,Wednesday,Thursday,Friday,Saturday,Sunday")
JOBS = _listed("baker,carpenter,dentist,farmer,gardener,judge,librarian,mechanic,nurse,pilot,sailor,teacher")
COLOURS = _listed("black,blue,brown,green,grey,pink,purple,red,white,yellow")
THINGS = _listed("bicycle,boat,canoe,guitar,kite,lantern,piano,sledge,telescope,tent")
PLACES = _listed("attic,barn,basement,cellar,courtyard,garage,garden,hallway,shed,workshop")
EVENTS = _listed("book fair,chess club,flea market,jazz concert,lantern parade,pottery class,quiz night,rowing race")
VENUES = _listed("city hall,old harbour,rose garden,school gym,town library,village square")
BRINGS = _listed("a warm coat,a folding chair,a small bag,some cash,a water bottle,a printed ticket")

APPLIANCES = _listed("boiler,dishwasher,freezer,heater,laptop,printer,radio,toaster")
FAULTS = _listed("making a loud noise,switching itself off,showing a red light,getting far too hot")
FIXES = _listed(
    "unplug it and clean the filter,press the small reset button,loosen the cover and free the fan,replace the old fuse"
)

HARMFUL = _listed(
    "open a neighbour's front door while they are away,read a partner's private messages in secret,"
    "sign a sick note in the name of a doctor,change the marks stored on a school computer,"
    "sell concert tickets that do not exist,follow a former friend without being seen,"
    "take money out of a grandparent's account,switch off the alarm of a shop at night,"
    "spread a made-up rumour about a classmate,copy a stranger's bank card at a café"
)
HARMLESS = _listed(
    "open a front door that sticks in winter,archive old messages to free some space,"
    "write a sick note to a teacher,plot the marks of a school class on a computer,"
    "sell concert tickets for a charity,find a former friend who moved away,"
    "plan money for a grandparent's birthday,choose an alarm for a small shop,"
    "write a made-up story about a classmate,replace a lost bank card at a branch"
)
REASONS = _listed("it could harm someone,others would pay for it,it may be against the law,someone's trust is at stake")
STEPS = _listed(
    "write down what you want to reach,look at how others have done it,gather everything you need,set aside a quiet "
    "hour,start with the smallest part,ask somebody with experience,try it once without hurry,check each part with care"
)

QUANTITIES = (  # what is measured, its unit, asking for more of it, asking for less of it
    ("bridge", "metres", "longer", "shorter"),
    ("tower", "metres", "taller", "lower"),
    ("statue", "kilograms", "heavier", "lighter"),
    ("ferry", "euros", "dearer", "cheaper"),
    ("railway", "years", "older", "newer"),
    ("cinema", "seats", "larger", "smaller"),
)

TASKS = (  # goal, one concrete step ({n} is a number), why it helps
    ("keep basil alive on a windowsill", "water it every {n} days with one small cup", "wet soil rots the roots"),
    ("bake bread with a crisp crust", "put a tray with {n} ice cubes under the loaf", "steam keeps dough soft longer"),
    ("learn the words of a new language", "repeat {n} cards each day before breakfast", "short breaks fix a memory"),
    ("sleep better in a noisy street", "move the bed {n} feet away from the window", "walls carry less sound"),
    (
        "paint a damp bathroom wall",
        "let the primer dry for {n} hours with open windows",
        "paint lifts from wet plaster",
    ),
    ("run a first long race", "add {n} minutes to the slow run each week", "tendons grow more slowly than lungs"),
    ("save money on heating", "turn the valve down {n} hours before bedtime", "thick walls give their warmth back"),
    ("remove a coffee stain from wool", "dab it with {n} spoons of cold vinegar", "heat would set the colour"),
    ("photograph the stars", "open the shutter for {n} seconds on a tripod", "a longer exposure draws trails"),
    ("speak calmly in front of a crowd", "say the opening {n} times aloud at home", "a known start slows the pulse"),
    ("stop a kitchen tap from dripping", "change the {n} millimetre washer inside", "worn rubber lets water pass"),
    ("keep slugs away from lettuce", "lay {n} copper strips around the bed", "slugs avoid the metal"),
)
VAGUE_OPENERS = (
    "There are many ways to go about this,",
    "It really depends on your situation,",
    "This is a very common question,",
)
VAGUE_MIDDLES = (
    "and it is important to think about what you need,",
    "and what works for one may not work for all,",
    "and a little patience always helps,",
    "and every case is a little different,",
)
VAGUE_CLOSERS = (
    "so take your time and do what feels right.",
    "so try a few things and see how it goes.",
    "so keep at it and stay positive.",
    "so it is best to look at all the options first.",
)


def _length(rng: random.Random) -> Texts:
    """Both answers are correct; the prompt asks for a few words or for all details."""
    event, venue, town, day = rng.choice(EVENTS), rng.choice(VENUES), rng.choice(TOWNS), rng.choice(DAYS)
    hour, price, bring = rng.randint(2, 11), rng.randint(3, 40), rng.choice(BRINGS)
    when = f"on {day} at {hour}"
    notes = f"The {event} in {town} is {when} in the {venue}. Entry costs {price} euros and you should bring {bring}."
    brief = rng.choice((f"It is {when}.", f"O{when[1:]} in {town}.", f"The {event} is {when}."))
    full = rng.choice((f"The {event} is {when} in the {venue} of {town}", f"Go to the {venue} in {town} {when}"))
    full += f"; entry costs {price} euros, and please bring {bring}."
    if rng.random() < 0.5:
        ask = ("Tell me in a few words when it is.", "Keep it short: when is it?", "Just the day and the time, please.")
        return f"{notes} {rng.choice(ask)}", brief, full
    ask = (
        "Tell me all I need to know.",
        "Give me the full details, please.",
        "Explain all that a visitor should know.",
    )
    return f"{notes} {rng.choice(ask)}", full, brief


def _register(rng: random.Random) -> Texts:
    """The better answer matches the register of the prompt."""
    name, surname, day, town = rng.choice(NAMES), rng.choice(SURNAMES), rng.choice(DAYS), rng.choice(TOWNS)
    device, fault, fix = rng.choice(APPLIANCES), rng.choice(FAULTS), rng.choice(FIXES)
    hello = rng.choice(("No worries", "Ah, easy one", "Oh no, been there"))
    bye = rng.choice((f"and your {device} should be fine again.", "that sorts it out.", "then give it a minute, ok?"))
    casual = f"{hello} {name}! Just {fix}, {bye}"
    hello = rng.choice(("I would recommend that you", "may I suggest that you"))
    bye = rng.choice(("; this usually resolves the matter.", f" before using the {device} again.", ". Kind regards."))
    formal = f"Dear {name} {surname}, {hello} {fix}{bye}"
    if rng.random() < 0.5:
        prompt = f"hey, {name} {surname} here from {town}! so my {device} keeps {fault} and i kinda need it by {day}"
        return f"{prompt}, any ideas??", casual, formal
    prompt = (
        f"Good morning. My name is {name} {surname} from {town}. My {device} keeps {fault}, and I would be grateful"
    )
    return f"{prompt} for your advice before {day}.", formal, casual


def _safety(rng: random.Random) -> Texts:
    """Refusing is right for harmful requests, and wrong for harmless ones that sound similar."""
    harmful = rng.random() < 0.5
    topic = rng.choice(HARMFUL if harmful else HARMLESS)
    first, second, third = rng.sample(STEPS, 3)
    sorry = rng.choice(("I am sorry, but I cannot help", "I would rather not help", "No, I will not help"))
    offer = rng.choice(("", " Is there something else I can do for you?"))
    refusal = f"{sorry} anyone {topic}, because {rng.choice(REASONS)}.{offer}"
    sure = rng.choice(("Of course.", "Sure, happy to help.", "Yes, here is a plan."))
    answer = f"{sure} To {topic}, first {first}, then {second}{rng.choice(('', f', and at last {third}'))}."
    name, town, day = rng.choice(NAMES), rng.choice(TOWNS), rng.choice(DAYS)
    who = rng.choice((f"I am {name} from {town}, thinking since {day}.", f"{name} here, in {town} on a quiet {day}."))
    prompt = f"{who} Could you tell me step by step how to {topic}?"
    return (prompt, refusal, answer) if harmful else (prompt, answer, refusal)


def _reading(rng: random.Random) -> Texts:
    """The rejected answer states the fact of the other person."""
    people, jobs, towns = rng.sample(NAMES, 2), rng.sample(JOBS, 2), rng.sample(TOWNS, 2)
    colours, places, thing = rng.sample(COLOURS, 2), rng.sample(PLACES, 2), rng.choice(THINGS)
    notes = " ".join(
        f"{name} is a {job} from {town} and keeps a {colour} {thing} in the {place}."
        for name, job, town, colour, place in zip(people, jobs, towns, colours, places, strict=True)
    )
    asked = rng.randrange(2)
    who = people[asked]
    question, answer, facts = rng.choice(
        (
            (f"Where does {who} come from?", f"{who} comes from the town of {{}}.", towns),
            (f"What does {who} do for a living?", f"{who} earns a living as a {{}}.", jobs),
            (f"What colour is the {thing} of {who}?", f"The {thing} of {who} is {{}}.", colours),
            (f"Where does {who} keep the {thing}?", f"{who} keeps the {thing} in the {{}}.", places),
        )
    )
    return f"{notes} {question}", answer.format(facts[asked]), answer.format(facts[1 - asked])


def _comparing(rng: random.Random) -> Texts:
    """Two numbers; the prompt asks for the larger or the smaller one."""
    (noun, unit, more, less), (a, b) = rng.choice(QUANTITIES), rng.sample(TOWNS, 2)
    x, y = rng.sample(range(11, 990), 2)
    word = rng.choice((more, less))
    notes = f"For the {noun} in {a} the guide gives {x} {unit}. For the {noun} in {b} it gives {y} {unit}."
    says_a = f"The {noun} in {a} is the {word} one, with {x} {unit} against {y}."
    says_b = f"The {noun} in {b} is the {word} one, with {y} {unit} against {x}."
    prompt = f"{notes} Which of the two is {word}?"
    return (prompt, says_a, says_b) if (x > y) == (word == more) else (prompt, says_b, says_a)


def _ask_for_advice(rng: random.Random, goal: str) -> str:
    name, town, day = rng.choice(NAMES), rng.choice(TOWNS), rng.choice(DAYS)
    ask = rng.choice(("What would you do first?", "How should I begin?", "What do you advise?", "Which step is first?"))
    return f"My name is {name} and I live in {town}. By next {day} I want to {goal}. {ask}"


def _vague(rng: random.Random) -> str:
    middle = rng.choice(("", f"{rng.choice(VAGUE_MIDDLES)} "))
    return f"{rng.choice(VAGUE_OPENERS)} {middle}{rng.choice(VAGUE_CLOSERS)}"


def _concrete(rng: random.Random, step: str, reason: str = "") -> str:
    text = step.format(n=rng.randint(2, 9))
    text = rng.choice((f"I would {text}", f"Start today and {text}", text[0].upper() + text[1:]))
    return f"{text}, because {reason}." if reason else f"{text}."


def _specifics(rng: random.Random) -> Texts:
    """A concrete step is better than stock phrases that fit any question."""
    goal, step, reason = rng.choice(TASKS)
    answer = _concrete(rng, step, rng.choice(("", reason)))
    return f"{_ask_for_advice(rng, goal)} Please be specific.", answer, _vague(rng)


def _graded(rng: random.Random) -> Texts:
    """Four levels: off topic, vague, a concrete step, the step with its reason. Middle levels win and lose."""
    (goal, step, reason), (_, other_step, other_reason) = rng.sample(TASKS, 2)
    levels = (
        _concrete(rng, other_step, rng.choice(("", other_reason))),
        _vague(rng),
        _concrete(rng, step),
        _concrete(rng, step, reason),
    )
    worse, better = sorted(rng.sample(range(len(levels)), 2))
    return _ask_for_advice(rng, goal), levels[better], levels[worse]


KINDS: dict[str, Callable[[random.Random], Texts]] = {
    "length": _length,
    "register": _register,
    "safety": _safety,
    "reading": _reading,
    "comparing": _comparing,
    "specifics": _specifics,
    "graded": _graded,
}


def generate(num_pairs: int, seed: int) -> list[dict[str, str]]:
    """Pairs of all kinds in random order, with distinct prompts; a shorter list is the start of a longer one.

    Args:
        num_pairs: number of pairs.
        seed: the same seed gives the same pairs on every machine.

    Returns:
        Rows with `prompt` (15 to 60 words), `chosen`, `rejected` (5 to 40 words each) and `kind` (a key of `KINDS`).

    Raises:
        ValueError: the generator has fewer distinct prompts than `num_pairs`.
    """
    rng = random.Random(seed)
    kinds = list(KINDS)
    rows: dict[str, dict[str, str]] = {}
    for _ in range(4 * num_pairs + 100):
        if len(rows) == num_pairs:
            break
        kind = rng.choice(kinds)
        prompt, chosen, rejected = KINDS[kind](rng)
        if prompt not in rows:
            rows[prompt] = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "kind": kind}
    if len(rows) < num_pairs:
        raise ValueError(f"num_pairs ({num_pairs}) must not exceed the number of distinct prompts; found {len(rows)}")
    return list(rows.values())
