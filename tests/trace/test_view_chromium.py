"""The page in a browser: every step shows what the trace says, in the colours of its scale, and the controls work."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from entrgi.trace import view
from support import traces
from support.browser import browse, document, needs_browser, screenshot

pytestmark = needs_browser

WORDS = [" the", " sky", " is", " blu", "ish", ",", " they", " say", " today", "."]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("page") / "page.html"
    view.write(file, traces.trace(WORDS, copies=3, prompts=("Tell me", "And you")))
    return file


def shown(page_document):
    """Run -> per column the token's text, None where masked."""
    result = {}
    for name, columns in page_document.runs().items():
        assert [int(column.attributes["data-column"]) for column in columns] == list(range(len(columns)))
        assert all(("token" in c.classes) != ("mask" in c.classes) for c in columns)
        result[name] = [column.text if "token" in column.classes else None for column in columns]
    return result


def step_of(page_document):
    return page_document.id("step").text


def at_step(made):
    """What the page shows, asserted to be one step: the same words in both runs, the newest standing out."""
    step = int(re.fullmatch(r"step (\d+) of 10", step_of(made))[1])
    expected = [None] * (10 - step) + [word.strip() for word in WORDS[10 - step :]]
    assert shown(made) == {"unguided": expected, "entrgi": expected}
    for columns in made.runs().values():
        assert [i for i, c in enumerate(columns) if "new" in c.classes] == ([10 - step] if step else [])
    return step


@pytest.mark.parametrize("step", [0, 6, 10])
def test_step_shows_what_is_committed(page, step):
    assert at_step(document(page, f"step={step}")) == step


def test_colour_is_the_entropy_weight(page):
    """Column c has weight (c + 1) / 10 throughout: the ramp in order in the guided run, none in the other."""
    runs = document(page, "step=5&theme=light").runs()
    fills = [re.search(r"--fill: ?([^;]+)", c.attributes.get("style") or "") for c in runs["entrgi"]]
    colours = [tuple(map(int, re.findall(r"\d+", fill[1]))) for fill in fills]
    assert len(set(colours)) == 10
    assert all(sum(a) > sum(b) for a, b in pairwise(colours))  # lighter is smaller
    assert colours[-1] == ramp_stops("light")[-1]
    assert not any("--fill" in (c.attributes.get("style") or "") for c in runs["unguided"])
    by_entropy = document(page, "step=5&colour=entropy").runs()["unguided"]
    assert all("--fill" in c.attributes["style"] for c in by_entropy)


def ramp_stops(theme):
    source = (Path(view.__file__).parent / "viewer" / "colour.js").read_text(encoding="utf-8")
    stops = re.search(rf"{theme}: \[([^\]]+)\]", source)[1]
    return [tuple(bytes.fromhex(stop)) for stop in re.findall(r"#(\w{6})", stops)]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_screenshot(page, theme):
    image = screenshot(page, f"step=5&theme={theme}")
    assert image.size == (1280, 860)
    colours = {colour: count for count, colour in image.getcolors(maxcolors=2**24)}
    assert len(colours) > 200
    assert max(colours.values()) < 0.9 * 1280 * 860  # not blank
    for stop in (ramp_stops(theme)[0], ramp_stops(theme)[-1]):  # both ends of the legend
        assert any(colour_distance(colour, stop) <= 2 for colour in colours)
    # Unguided on the left, guided on the right, each with its dot; ramp colours on the right alone.
    cards = {"left": image.crop((60, 140, 640, 330)), "right": image.crop((640, 140, 1220, 330))}
    dots = {"light": {"left": "6f7681", "right": "c2571a"}, "dark": {"left": "9aa1ac", "right": "f09a5b"}}[theme]
    for side, card in cards.items():
        assert count_near(card, tuple(bytes.fromhex(dots[side]))) >= 30
        strongest = ramp_stops(theme)[-1]
        assert (count_near(card, strongest) >= 40) is (side == "right")


def count_near(image, colour):
    return sum(count for count, c in image.getcolors(maxcolors=2**24) if colour_distance(c, colour) <= 2)


def colour_distance(a, b):
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def test_narrow_screens_stack_the_runs(page):
    """Both runs' text, none of it beyond the right edge."""
    image = screenshot(page, "step=5&theme=light", size=(500, 1400))
    for colour in ("6f7681", "c2571a"):
        assert count_near(image, tuple(bytes.fromhex(colour))) >= 30
    script = "document.title = JSON.stringify([document.documentElement.scrollWidth, innerWidth])"
    changed = page.with_name("narrow.html")
    changed.write_text(page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>"))
    made = browse(changed, "step=5", "--dump-dom", size=(500, 900))
    scroll, inner = json.loads(re.search(r"<title>(.*?)</title>", made)[1])
    assert scroll <= inner


def test_prompt_and_trajectory_of_the_address(page):
    made = document(page, "step=10&prompt=2&trajectory=3")
    assert made.id("prompt").tag == "select"
    assert "And you" in made.id("messages").text
    pressed = [b.text for b in made.id("trajectory").all(lambda e: e.attributes.get("aria-pressed") == "true")]
    assert pressed == ["3"]
    scores = [e.text for e in made.root.all(lambda e: "score" in e.classes)]
    assert scores == ["reward−1.50"] * 2  # 0.5 - k
    assert step_of(made) == "step 10 of 10"
    assert step_of(document(page, "step=999&prompt=x&trajectory=-3&colour=none")) == "step 10 of 10"


def press(*keys):
    """A script that presses ``keys`` one after the other."""
    event = "document.body.dispatchEvent(new KeyboardEvent('keydown', {{key: {}, bubbles: true}}));"
    return "".join(event.format(json.dumps(key)) for key in keys)


def test_keyboard_moves_through_the_steps(page):
    """The step after each sequence of keys, from step 5 on."""
    sequences = [
        (["ArrowLeft"], 4),
        (["ArrowRight", "ArrowRight"], 6),
        (["Home"], 0),
        (["ArrowLeft"], 0),
        (["PageDown"], 10),
        (["ArrowRight"], 10),
        (["PageUp", "ArrowRight"], 1),
        ([" ", " "], 1),
        (["End"], 10),
        (["ArrowLeft", "ArrowLeft", "ArrowLeft"], 7),
    ]
    look = "seen.push(Number(document.querySelector('#step b').textContent));"
    script = "const seen = [];" + "".join(press(*keys) + look for keys, _ in sequences)
    made = document(page, "step=5", script + "document.title = JSON.stringify(seen)")
    assert json.loads(title_of(made)) == [step for _, step in sequences]
    assert at_step(made) == 7  # the texts follow, not the number alone


def title_of(made):
    return next(made.root.all(lambda e: e.tag == "title")).text


def test_keys_for_trajectory_prompt_colour_and_theme(page):
    script = press("]", "]", "[", "}", "c", "d") + "document.title = location.hash"
    made = document(page, "step=5&theme=light", script)
    assert title_of(made) == "#step=5&prompt=2&trajectory=2&colour=entropy&theme=dark"


def test_play_runs_to_the_end(page):
    made = document(page, "step=0", "document.getElementById('play').click()")
    assert step_of(made) == "step 10 of 10"
    assert made.id("play").attributes["aria-label"] == "Play"


def test_slider_and_curves_move_together(page):
    script = "const s = document.getElementById('slider'); s.value = 3; s.dispatchEvent(new Event('input'));"
    made = document(page, "step=0", script)
    assert step_of(made) == "step 3 of 10"
    charts = {e.attributes["data-curve"]: e for e in made.root.all(lambda e: "data-curve" in e.attributes)}
    assert list(charts) == ["reward", "entropy", "weight"]
    cursors = {c.attributes["x1"] for e in charts.values() for c in e.all(lambda e: "cursor" in e.classes)}
    assert len(cursors) == 2  # the reward's chart is narrower by its labels
    label = next(charts["weight"].all(lambda e: e.tag == "svg")).attributes["aria-label"]
    assert label == "Entropy weight at step 3: entrgi 0.45"  # mean of 0.1 ... 0.8


def test_final_texts_and_rewards(page):
    rows = list(document(page, "step=0").id("results").all(lambda e: e.tag == "tr"))
    cells = [[cell.text for cell in row.all(lambda e: e.tag in ("td", "th"))] for row in rows]
    text = "".join(WORDS)
    rewards = ["+0.50", "−0.50", "−1.50"]
    assert cells[1:4] == [[str(k + 1), text, reward, text, reward] for k, reward in enumerate(rewards)]
    assert cells[4:] == [["", "Avg@3", "−0.50", "Avg@3", "−0.50"], ["", "Top@1", "+0.50", "Top@1", "+0.50"]]


def test_hostile_texts_stay_text(tmp_path):
    file = tmp_path / "page.html"
    view.write(file, traces.trace(prompts=("</script><img src=x onerror=alert(1)>", "<b>bold</b>")))
    made = document(file, "step=20")
    tokens = shown(made)["entrgi"]
    assert tokens[0] == "</script><script>alert(1)</script>"
    assert tokens[8:12] == ["↵", "↵↵", "⇥", "␣␣␣␣"]
    assert tokens[17] == "\\x00\\x1b[31m"
    assert "</script><img src=x onerror=alert(1)>" in made.id("messages").text
    assert not list(made.root.all(lambda e: e.tag in ("img", "b") and "onerror" in e.attributes))


def test_interrupted_runs_show_what_there_is(tmp_path):
    file = tmp_path / "page.html"
    view.write(file, traces.trace(WORDS, steps=4, complete=False))
    made = document(file, "step=10")
    assert shown(made)["entrgi"] == [None] * 6 + [word.strip() for word in WORDS[6:]]
    assert [e.text for e in made.root.all(lambda e: "badge" in e.classes)] == ["interrupted"] * 2


def test_errors_on_the_page_are_noticed(page):
    with pytest.raises(AssertionError, match="Uncaught"):
        document(page, "step=0", "nothing.here()")
