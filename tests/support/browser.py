"""Pages in headless Chromium: their document after the scripts have run, and what they look like."""

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BINARY = next((path for path in map(shutil.which, NAMES) if path), None)
needs_browser = pytest.mark.skipif(BINARY is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")


def browse(page, address, *arguments, size=(1280, 860)):
    """Run the browser; its standard output. Whatever the page reports on its console fails the test."""
    profile = page.parent / "profile"
    command = [
        *(BINARY, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
        *("--force-device-scale-factor=1", f"--window-size={size[0]},{size[1]}", f"--user-data-dir={profile}"),
        *("--no-first-run", "--enable-logging=stderr", "--virtual-time-budget=30000", *arguments),
        f"file://{page}#{address}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    complaints = [line for line in result.stderr.splitlines() if re.search(r"CONSOLE|Uncaught|Refused to", line)]
    assert not complaints, complaints
    return result.stdout


def document(page, address, script=""):
    """The document at ``address``, after ``script`` has run in it, if any."""
    if script:
        changed = page.with_name("scripted.html")
        changed.write_text(page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>"))
        page = changed
    return Document(browse(page, address, "--dump-dom"))


def screenshot(page, address, size=(1280, 860)):
    """RGB image of the page."""
    from PIL import Image

    file = page.with_name("shot.png")
    browse(page, address, f"--screenshot={file}", size=size)
    with Image.open(file) as image:
        return image.convert("RGB")


@dataclass
class Element:
    tag: str
    attributes: dict
    children: list = field(default_factory=list)

    @property
    def classes(self):
        return (self.attributes.get("class") or "").split()

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, accepts):
        """Elements below this one for which ``accepts(element)``, in order."""
        for child in self.children:
            if not isinstance(child, str):
                if accepts(child):
                    yield child
                yield from child.all(accepts)


class Document(HTMLParser):
    """A document as elements."""

    EMPTY = ("meta", "link", "input", "br", "hr", "img")

    def __init__(self, text):
        super().__init__()
        self.root = Element("", {})
        self.path = [self.root]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        element = Element(tag, dict(attributes))
        self.path[-1].children.append(element)
        if tag not in self.EMPTY:
            self.path.append(element)

    def handle_endtag(self, tag):
        while len(self.path) > 1 and self.path.pop().tag != tag:
            pass

    def handle_data(self, data):
        self.path[-1].children.append(data)

    def id(self, name):
        return next(self.root.all(lambda element: element.attributes.get("id") == name))

    def runs(self):
        """Name -> the elements of its columns."""
        cards = self.root.all(lambda element: "data-run" in element.attributes)
        return {
            card.attributes["data-run"]: list(card.all(lambda element: "data-column" in element.attributes))
            for card in cards
        }
