"""The page of a trace: one file, nothing from outside, and whatever text a model writes stays text."""

import json
import os
import re
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from entrgi.cli import app
from entrgi.trace import lines, view, write
from support import traces


class Page(HTMLParser):
    """Elements in order, and the text of every script and style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], {}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.open = dict(attributes).get("id", tag)

    def handle_endtag(self, tag):
        self.open = None if tag in ("script", "style") else self.open

    def handle_data(self, data):
        if self.open is not None:
            self.texts[self.open] = self.texts.get(self.open, "") + data


def test_data_reads_back():
    trace = traces.trace()
    page = Page(view.page(trace))
    assert json.loads(page.texts["trace"]) == json.loads(json.dumps(list(lines(trace))))


def test_no_text_leaves_its_place():
    """Hostile pieces, prompts and names add no element, and end none."""
    harmless, hostile = (Page(view.page(traces.trace(pieces))) for pieces in (["a"] * 20, traces.HOSTILE))
    assert hostile.tags == harmless.tags
    assert [hostile.texts[name] for name in ("style", "script")] == [harmless.texts[n] for n in ("style", "script")]
    for text in ("</script>", "<!--", "&amp;", "\u2028"):
        assert text not in hostile.texts["trace"]
    assert "${x}" in hostile.texts["trace"]


def test_nothing_comes_from_outside():
    text = view.page(traces.trace())
    assert not re.findall(r"https?:|//[a-z]+\.|@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket|importScripts", text)
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "img", "base", "form")
        assert not attributes.keys() & {"src", "srcset", "action", "onclick", "onload"}
        assert attributes.get("href", "data:,") == "data:,"
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")


def test_same_trace_same_page(tmp_path):
    for name in ("a", "b"):
        view.write(tmp_path / f"{name}.html", traces.trace())
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_markers_of_the_template_are_gone():
    page = view.page(traces.trace(["a"]))
    assert not re.search(r"/\*(STYLE|TRACE|SCRIPT)\*/", page)


def test_command_writes_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("out.jsonl"), traces.trace())
    result = CliRunner().invoke(app, ["view", "out.jsonl"])
    assert (result.exit_code, result.output.strip()) == (0, "out.html")
    assert Path("out.html").read_text(encoding="utf-8") == view.page(traces.trace())
    result = CliRunner().invoke(app, ["view", "out.jsonl", "-o", "other.html"])
    assert (result.exit_code, result.output.strip()) == (0, "other.html")
    assert Path("other.html").read_bytes() == Path("out.html").read_bytes()


def test_traces_come_from_pipes_and_pages_go_into_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("out.jsonl"), traces.trace())
    os.mkfifo("in")
    os.mkfifo("page")
    received = []
    threading.Thread(target=lambda: Path("in").write_bytes(Path("out.jsonl").read_bytes()), daemon=True).start()
    reader = threading.Thread(target=lambda: received.append(Path("page").read_text(encoding="utf-8")), daemon=True)
    reader.start()
    assert CliRunner().invoke(app, ["view", "in", "-o", "page"]).exit_code == 0
    reader.join(timeout=20)
    assert received == [view.page(traces.trace())]
    assert Path("page").is_fifo()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl"], "no file 'none.jsonl'"),
        (["bad.jsonl"], "bad.jsonl, line 1: expected a line of JSON"),
        (["out.jsonl", "-o", "nowhere/x.html"], "--output: no folder"),
        (["out.jsonl", "-o", "."], "--output: '.' is a folder"),
        (["out.html"], "--output: 'out.html' is the trace itself"),
        (["out.jsonl", "-o", "out.jsonl"], "--output: 'out.jsonl' is the trace itself"),
        (["out.jsonl", "-o", "link.jsonl"], "--output: 'link.jsonl' is the trace itself"),
        (["pipe"], "--output: expected the page to write, since 'pipe' is no file with a name for it"),
        (["."], "--output: expected the page to write"),
        (["out.jsonl", "-o", "a" * 300], "--output: "),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(Path("out.jsonl"), traces.trace())
    Path("bad.jsonl").write_text("not a trace")
    Path("link.jsonl").symlink_to("out.jsonl")
    os.mkfifo("pipe")
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(app, ["view", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before
