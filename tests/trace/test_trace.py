"""Traces: what they record of a generation, that they read back, and that they are written whole or not at all."""

import json
import math
import os
import subprocess
import sys
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from entrgi import generate, preset
from entrgi.files import write_text
from entrgi.trace import TraceError, lines, read, reader, record, write
from entrgi.trace.recorder import plain_prompt
from entrgi.vocabulary.pieces import sequence_pieces
from support import tiny, tokenizer_kinds, traces

PROMPTS = ["the movie", "w1 w2 w3 w4"]
CONFIG = preset("paper", num_return_sequences=2, max_new_tokens=5, steps=5, guidance_steps=2)
MASK = 4


def recorded(config=CONFIG, prompts=PROMPTS, denoiser=None, reward=None, **options):
    denoiser = denoiser or tiny.denoiser()
    output = generate(prompts, denoiser, reward or tiny.bert_reward(), config, seed=3, output_history=True, **options)
    return output, record(prompts, {"run": (config, output)}, denoiser, {"seed": 3})


def replayed(trace, run, prompt, trajectory):
    """The window's pieces after all steps, None where masked."""
    window = [None] * trace.prompts[prompt].width
    for column, piece in trace.prompts[prompt].given:
        window[column] = piece
    for step in run.steps:
        for part in step.trajectories:
            if (part.prompt, part.trajectory) == (prompt, trajectory):
                for column, piece in part.commits:
                    assert window[column] is None
                    window[column] = piece
    return window


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"guidance": "none"},
        {"guidance_interval": 2},
        {"block_length": 2},
        {"guidance": "none", "block_length": 2},
        {"threshold": -3.0},
        {"best_of": 4},
        {"alg": "origin"},
    ],
    ids=str,
)
def test_trace_is_what_happened(change):
    config = replace(CONFIG, **change)
    output, trace = recorded(config)
    (run,) = trace.runs
    assert run.complete
    assert [step.step for step in run.steps] == output.history.step
    for b, (start, stop) in enumerate(output.windows):
        for k in range(2):
            ids = output.sequences[b, k, start:stop]
            words = [tiny.WORDS[i] for i in ids.tolist()]
            assert [piece.strip() for piece in replayed(trace, run, b, k)] == words
    for step, state in zip(run.steps, output.steps, strict=True):
        assert len(step.trajectories) > 0
        for part in step.trajectories:
            row, start = part.prompt * 2 + part.trajectory, output.windows[part.prompt][0]
            at = torch.tensor(part.columns) + start
            new = torch.tensor([column for column, _ in part.commits]) + start
            assert torch.equal(state.committed[row].nonzero()[:, 0], new)
            for name, values in (("entropy", part.entropy), ("weight", part.weight)):
                expected = getattr(state, name)[row, at].tolist()
                values = [None] * len(expected) if values is None else values
                assert all((x is None) == math.isnan(y) for x, y in zip(values, expected, strict=True))
                assert all(x is None or abs(x - y) <= 5.1e-5 for x, y in zip(values, expected, strict=True))
            expected = state.reward[row].item()
            assert (part.reward is None) == math.isnan(expected) == (not config.is_guided(step.step))
            assert part.reward is None or abs(part.reward - expected) <= 5.1e-5
    assert [result.texts for result in run.results] == output.texts
    assert [result.seeds for result in run.results] == output.seeds.tolist()
    rewards = torch.tensor([result.rewards for result in run.results])
    torch.testing.assert_close(rewards, output.rewards, atol=5.1e-5, rtol=0)


def test_reads_back_as_it_was_written(tmp_path):
    _, trace = recorded()
    file = tmp_path / "out.jsonl"
    write(file, trace)
    assert read(file) == trace
    assert len(file.read_text().splitlines()) == 1 + len(trace.runs[0].steps) + 1
    write(file, traces.trace())
    assert read(file) == traces.trace()


def test_two_runs_in_one_file(tmp_path):
    denoiser, reward = tiny.denoiser(), tiny.bert_reward()
    configs = {"unguided": replace(CONFIG, guidance="none"), "entrgi": CONFIG}
    runs = {
        name: (config, generate(PROMPTS, denoiser, reward, config, seed=1, output_history=True))
        for name, config in configs.items()
    }
    write(tmp_path / "two.jsonl", record(PROMPTS, runs, denoiser, {}))
    trace = read(tmp_path / "two.jsonl")
    assert [run.name for run in trace.runs] == list(configs)
    assert [run.config["guidance"] for run in trace.runs] == ["none", "entrgi"]
    assert {part.weight for step in trace.runs[0].steps for part in step.trajectories} == {None}


def test_early_exit_fills_are_commits():
    """What is filled behind an end of sequence is no commit of the sampler's, but it appears in that step."""
    denoiser = tiny.denoiser()
    plain = denoiser.logits

    def ending(tokens, attention_mask, positions):
        logits = plain(tokens, attention_mask, positions)
        logits[:, 3] = torch.where(positions % tokens.shape[1] == 4, 100.0, -100.0)  # [SEP] after the first word
        return logits

    denoiser.logits = ending
    config = replace(CONFIG, early_exit=True, deprioritize_eos=False, guidance="none", alg="maskgit_plus")
    output, trace = recorded(config, ["the movie"], denoiser)
    committed = torch.stack([state.committed for state in output.steps]).any(0)[:, 3:8]
    assert not committed.all()
    for k in range(2):
        pieces = [piece.strip() for piece in replayed(trace, trace.runs[0], 0, k)]
        assert pieces == [tiny.WORDS[i] for i in output.sequences[0, k, 3:8].tolist()]
        assert {piece for piece, done in zip(pieces, committed[k].tolist(), strict=True) if not done} <= {"[SEP]"}
    assert trace.special == [" [SEP]"]


def test_infilled_prompts_keep_their_own_words():
    config = replace(CONFIG, infill=True, max_new_tokens=1)
    _, trace = recorded(config, ["the [MASK] was w7 [MASK] good", "w1 [MASK]"])
    first, second = trace.prompts
    assert [(column, piece.strip()) for column, piece in first.given] == [(1, "was"), (2, "w7"), (4, "good")]
    assert (first.width, second.width, second.given) == (6, 2, [])
    for b in range(2):
        assert None not in replayed(trace, trace.runs[0], b, 0)


def test_interrupted_run_is_a_valid_trace(tmp_path):
    def press(state):
        if state.step == 2:
            raise KeyboardInterrupt

    denoiser = tiny.denoiser()
    with pytest.raises(KeyboardInterrupt) as caught:
        generate(PROMPTS, denoiser, tiny.bert_reward(), CONFIG, seed=1, output_history=True, callback_on_step_end=press)
    trace = record(PROMPTS, {"entrgi": (CONFIG, caught.value.partial)}, denoiser, {})
    write(tmp_path / "part.jsonl", trace)
    (run,) = read(tmp_path / "part.jsonl").runs
    assert not run.complete
    assert [step.step for step in run.steps] == [1, 2]
    assert [result.rewards for result in run.results] == [[None, None]] * 2
    assert sum(piece is not None for piece in replayed(trace, run, 1, 1)) == 2


def test_history_is_needed():
    output = generate(PROMPTS, tiny.denoiser(), tiny.bert_reward(), CONFIG, seed=1)
    with pytest.raises(ValueError, match=r"runs\['x'\] has no steps, expected .*output_history=True"):
        record(PROMPTS, {"x": (CONFIG, output)}, tiny.denoiser(), {})
    with pytest.raises(ValueError, match="runs: expected at least one"):
        record(PROMPTS, {}, tiny.denoiser(), {})


def test_runs_must_match():
    runs = {
        str(k): (config, recorded(config)[0])
        for k, config in ((2, CONFIG), (3, replace(CONFIG, num_return_sequences=3)))
    }
    with pytest.raises(ValueError, match=r"runs\['3'\] has other windows or another number of trajectories"):
        record(PROMPTS, runs, tiny.denoiser(), {})


def changed(index, **change):
    """The lines of a small trace with one of them changed; a value may be a function of the old one."""

    def rows():
        data = json.loads(json.dumps(list(lines(traces.trace(pieces=["a", "b"], copies=1, prompts=("p",))))))
        for name, value in change.items():
            place, *path = name.split("__")
            target = data[index]
            for step in [place, *path][:-1]:
                target = target[int(step) if step.isdigit() else step]
            last = [place, *path][-1]
            target[int(last) if last.isdigit() else last] = value
        return [json.dumps(line) for line in data]

    return rows


PART = "trajectories__0__"


def doubled():
    """A step in which a trajectory occurs twice."""
    rows = [json.loads(row) for row in changed(0)()]
    rows[1]["trajectories"] *= 2
    return [json.dumps(row) for row in rows]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda: [], r"line 1: expected a line of JSON, got ''"),
        (lambda: ["{"], r"line 1: expected a line of JSON, got '\{'"),
        (lambda: ["[1]"], r"line 1: expected a JSON object"),
        (lambda: changed(0)()[1:], r"line 1: expected a line of kind 'header', got 'step'"),
        (changed(0, format="other"), r"line 1: expected the format 'entrgi-trace', got 'other'"),
        (changed(0, version=2), r"line 1: expected version 1, got 2"),
        (changed(0, copies=0), r"line 1: expected 'copies' to be an integer >= 1, got 0"),
        (changed(0, prompts=[]), r"line 1: expected at least one prompt and one run"),
        (changed(0, prompts=[{"prompt": "p"}]), r"line 1: expected objects with prompt, width, given in 'prompts'"),
        (changed(0, source=1), r"line 1: expected 'source' to be of type dict"),
        (changed(1, run="other"), r"line 2: expected a line of kind 'step' or 'end' of run 'unguided', got 'step' of"),
        (changed(2, step=0), r"line 3: expected 'step' to be an integer >= 1, got 0"),
        (changed(1, seconds="1"), r"line 2: expected 'seconds' to be of type float"),
        (changed(1, **{PART + "trajectory": 1}), r"line 2: expected a prompt and a trajectory of the header"),
        (changed(1, **{PART + "columns": [0]}), r"line 2: expected columns \[0, 1\], those still masked, got \[0\]"),
        (changed(1, **{PART + "entropy": [1.0]}), r"line 2: expected one entropy for each of 2 columns"),
        (changed(1, **{PART + "entropy": ["1", 2]}), r"line 2: expected numbers or null in 'entropy'"),
        (changed(1, **{PART + "reward": "1"}), r"line 2: expected a number or null as 'reward'"),
        (changed(1, **{PART + "commits": [[2, "c"]]}), r"line 2: expected commits to masked columns, got \[2\]"),
        (changed(1, **{PART + "commits": [["1", "c"]]}), r"line 2: expected \[column, piece\] in 'commits'"),
        (changed(3, complete=1), r"line 4: expected 'complete' to be of type bool"),
        (changed(3, results=[]), r"line 4: expected results of 1 prompts, got 0"),
        (changed(3, results__0__texts=[]), r"line 4: expected results with 1 trajectories"),
        (lambda: changed(0)()[:-1], r"line 7: expected a line of kind 'step' or 'end' .*got the end of the file"),
        (lambda: [*changed(0)(), "{}"], r"line 8: expected the end of the file"),
        (lambda: [r.replace("0.01", "NaN") for r in changed(0)()], r"line 2: expected a line of JSON.*NaN is not"),
        # sizes that the file cannot hold
        (changed(0, copies=10**9), r"line 1: expected fewer trajectories than a file of \d+ char.*1000000000 copies"),
        (changed(0, copies=10**30), r"line 1: expected fewer trajectories than a file"),
        (changed(0, prompts__0__width=10**9), r"line 1: expected smaller windows in a file of .*2000000000 columns"),
        (changed(0, prompts__0__width=10**30), r"line 1: expected smaller windows in a file"),
        (changed(0, prompts__0__width=10**5), r"line 2: expected columns \[0, 1, 2.*100000 of them\)\].*got \[0, 1\]"),
        (changed(0, runs__0__config__steps=10**30), r"line 1: expected 'steps' to be at most 2147483648, got 1000"),
        (changed(0, runs__0__config__steps=1), r"line 3: expected 'step' to be at most 0, got 1"),
        (changed(1, step=10**30), r"line 2: expected 'step' to be at most 1, got 1000"),
        # types
        (changed(0, version=True), r"line 1: expected version 1, got True"),
        (changed(0, version=1.0), r"line 1: expected version 1, got 1.0"),
        (changed(0, format=["entrgi-trace"]), r"line 1: expected the format 'entrgi-trace', got \["),
        (changed(0, kind=[]), r"line 1: expected a line of kind 'header', got \[\]"),
        (changed(0, copies=True), r"line 1: expected 'copies' to be an integer >= 1, got True"),
        (changed(0, copies=1.0), r"line 1: expected 'copies' to be an integer"),
        (changed(0, special=[1]), r"line 1: expected texts in 'special', got 1"),
        (changed(0, special="abc"), r"line 1: expected 'special' to be of type list"),
        (changed(0, prompts__0__prompt=1), r"line 1: expected a text or messages .*got 1"),
        (changed(0, prompts__0__prompt=None), r"line 1: expected a text or messages .*got None"),
        (changed(0, prompts__0__prompt=[]), r"line 1: expected a text or messages .*got \[\]"),
        (changed(0, prompts__0__prompt=[{"role": "user", "content": [1]}]), r"line 1: expected a text or messages"),
        (changed(0, prompts__0__given=[[True, "a"]]), r"line 1: expected \[column, piece\] in 'given'"),
        (changed(0, prompts__0__given=[[-1, "a"]]), r"line 1: expected \[column, piece\] in 'given'"),
        (changed(0, prompts__0__given=[[2, "a"]]), r"line 1: expected columns below the width 2 in 'given', got \[2\]"),
        (changed(0, prompts__0__given=[[0, "a"], [0, "b"]]), r"line 1: expected every column at most once in 'given'"),
        (changed(0, prompts__0__given=[[0, 1]]), r"line 1: expected \[column, piece\] in 'given'"),
        (changed(0, runs=5), r"line 1: expected 'runs' to be of type list"),
        (changed(0, runs__0__name=5), r"line 1: expected different texts as the names of runs, got \[5"),
        (changed(0, runs__0__name=["a"]), r"line 1: expected different texts as the names of runs"),
        (changed(0, runs__0__name="entrgi"), r"line 1: expected different texts as the names of runs"),
        (changed(0, runs__0__config=[]), r"line 1: expected 'config' to be of type dict"),
        (changed(0, runs__0__config={}), r"line 1: expected 'guidance' to be of type str, got None"),
        (changed(0, runs__0__config={"guidance": "none"}), r"line 1: expected 'steps' to be an integer >= 1, got None"),
        (changed(0, runs__0__config__steps="4"), r"line 1: expected 'steps' to be an integer"),
        (changed(0, runs__0__config__temperature=[1]), r"line 1: expected 'temperature' to be of type float"),
        (changed(0, runs__0__config__max_new_tokens={}), r"line 1: expected a number or a text as 'max_new_tokens'"),
        (changed(0, source__rewards=5), r"line 1: expected a list of names.*as 'rewards', got 5"),
        (changed(0, source__rewards=[None]), r"line 1: expected a list of names.*as 'rewards'"),
        (changed(0, source__seed=[1]), r"line 1: expected a text or a number as 'seed', got \[1\]"),
        (changed(0, source__denoiser={}), r"line 1: expected a text or a number as 'denoiser'"),
        (changed(1, trajectories={}), r"line 2: expected 'trajectories' to be of type list"),
        (changed(1, trajectories=[1]), r"line 2: expected objects with prompt, trajectory"),
        (changed(1, **{PART + "prompt": [0]}), r"line 2: expected a prompt and a trajectory of the header"),
        (changed(1, **{PART + "prompt": False}), r"line 2: expected a prompt and a trajectory of the header"),
        (changed(1, **{PART + "trajectory": 0.0}), r"line 2: expected a prompt and a trajectory of the header"),
        (changed(1, **{PART + "trajectory": -1}), r"line 2: expected a prompt and a trajectory of the header"),
        (changed(1, **{PART + "columns": [0, True]}), r"line 2: expected columns \[0, 1\]"),
        (changed(1, **{PART + "columns": [0.0, 1.0]}), r"line 2: expected columns \[0, 1\]"),
        (changed(1, **{PART + "columns": [[0], 1]}), r"line 2: expected columns \[0, 1\]"),
        (changed(1, **{PART + "commits": [[True, "c"]]}), r"line 2: expected \[column, piece\] in 'commits'"),
        (changed(1, **{PART + "commits": [[1, "c"], [1, "d"]]}), r"line 2: expected every column at most once"),
        (changed(1, **{PART + "entropy": {}}), r"line 2: expected 'entropy' to be of type list"),
        (changed(4, **{PART + "weight": "x"}), r"line 5: expected 'weight' to be of type list"),
        (lambda: doubled()[:], r"line 2: expected (every trajectory at most once in a step|columns \[0\])"),
        (changed(3, results__0__texts=[1]), r"line 4: expected texts in 'texts', got 1"),
        (changed(3, results__0__responses=[None]), r"line 4: expected texts in 'responses', got None"),
        (changed(3, results__0__rewards=["1"]), r"line 4: expected numbers or null in 'rewards', got '1'"),
        (changed(3, results__0__rewards=[True]), r"line 4: expected numbers or null in 'rewards', got True"),
        (changed(3, results__0__seeds=["x"]), r"line 4: expected integers of 64 bits.*got 'x'"),
        (changed(3, results__0__seeds=[1.5]), r"line 4: expected integers of 64 bits"),
        (changed(3, results__0__seeds=[2**63]), r"line 4: expected integers of 64 bits"),
        (changed(3, results__0__seeds=["9" * 19]), r"line 4: expected integers of 64 bits"),
        # numbers
        (lambda: [r.replace("0.01", "1e999") for r in changed(0)()], r"line 2: .*1e999 is beyond what a float holds"),
        (lambda: [r.replace("0.01", "9" * 5000) for r in changed(0)()], r"line 2: expected a line of JSON"),
        (changed(1, seconds=-1), r"line 2: expected 'seconds' in \[0, "),
        (changed(1, **{PART + "reward": 1e300}), r"line 2: expected a number or null as 'reward', at most"),
        (changed(1, **{PART + "entropy": [1e30, 1]}), r"line 2: expected numbers in \[-0.01, 64.01\] in 'entropy'"),
        (changed(1, **{PART + "entropy": [-1, 1]}), r"line 2: expected numbers in .* in 'entropy', got -1"),
        (changed(4, **{PART + "weight": [1.5, 0.1]}), r"line 5: expected numbers in \[-0.01, 1.01\] in 'weight'"),
        (changed(3, results__0__rewards=[1e39]), r"line 4: expected numbers in .* in 'rewards'"),
        # JSON that no reader should follow
        (lambda: ["[" * 100_000 + "]" * 100_000], r"line 1: expected a line of JSON, got one nested too deep"),
        (
            lambda: ['{"kind":' * 50_000 + "1" + "}" * 50_000],
            r"line 1: expected a line of JSON, got one nested too deep",
        ),
    ],
)
def test_bad_files_name_line_and_expectation(tmp_path, rows, message):
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(rows()) + "\n")
    with pytest.raises(TraceError, match=r"bad\.jsonl, " + message):
        read(file)


def test_unreadable_files(tmp_path):
    with pytest.raises(TraceError, match="no file "):
        read(tmp_path / "none.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "binary.jsonl", tmp_path, Path("/dev/zero"), Path("a\0b"), Path("a" * 300)):
        with pytest.raises(TraceError, match="not readable as a trace"):
            read(path)


def test_endless_files_are_not_read_to_their_end(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_BYTES", 1000)
    (tmp_path / "long.jsonl").write_text("x" * 1001)
    with pytest.raises(TraceError, match="expected at most 1000 bytes"):
        read(tmp_path / "long.jsonl")


def test_sizes_are_paid_by_the_file(tmp_path):
    """Absurd headers cost neither time nor memory, whatever they say."""
    for change in ({"copies": 10**12}, {"prompts__0__width": 10**12}, {"runs__0__config__steps": 10**12}):
        (tmp_path / "bad.jsonl").write_text("\n".join(changed(0, **change)()))
        tracemalloc.start()
        with pytest.raises(TraceError, match="line 1"):
            read(tmp_path / "bad.jsonl")
        assert tracemalloc.get_traced_memory()[1] < 2**23
        tracemalloc.stop()


def test_pipes_marks_of_byte_order_and_old_seeds_are_read(tmp_path):
    trace = traces.trace()
    text = "".join(json.dumps(line) + "\n" for line in lines(trace))
    (tmp_path / "marked.jsonl").write_text("\ufeff" + text.replace("\n", "\r\n"))
    assert read(tmp_path / "marked.jsonl") == trace
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,), daemon=True)
    writer.start()
    assert read(tmp_path / "pipe") == trace
    rows = [json.loads(row) for row in text.splitlines()]
    for row in rows:
        for result in row.get("results", []):
            assert all(isinstance(seed, str) for seed in result["seeds"])
            result["seeds"] = list(map(int, result["seeds"]))
    (tmp_path / "numbers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(tmp_path / "numbers.jsonl") == trace


def test_messages_with_parts_are_recorded_as_texts():
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "movie"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    assert plain_prompt(chat) == [{"role": "user", "content": "the movie"}, {"role": "assistant", "content": ""}]
    assert plain_prompt("the movie") == "the movie"


def test_nothing_half_written(tmp_path, monkeypatch):
    file = tmp_path / "out.jsonl"
    file.write_text("old")

    plain = Path.write_text

    def interrupted(self, text, **options):
        plain(self, text[:10], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(file, traces.trace())
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_written_files_follow_links_and_the_umask(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    write_text(tmp_path / "link.txt", "a lone \udce9")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "a lone \\udce9"
    (tmp_path / "plain.txt").write_text("x")
    write_text(tmp_path / "new.txt", "x")
    assert (tmp_path / "new.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


def test_reading_needs_no_torch(tmp_path):
    write(tmp_path / "t.jsonl", traces.trace())
    code = (
        "import sys; from pathlib import Path; from entrgi import trace; from entrgi.trace import view;"
        f"view.page(trace.read(Path({str(tmp_path / 't.jsonl')!r}))); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


TEXTS = ["It's a film, isn't it?  Café \U0001f600 naïve.\n\nYes!", "a b", "x = {1: 'y'}\n\treturn"]


@pytest.mark.parametrize("kind", ["trained_byte_level", "trained_sentence_piece"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(kind, text):
    tokenizer = getattr(tokenizer_kinds, kind)(["It's a film, isn't it? return the café naïve"] * 20, 330)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = sequence_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    shown = "".join(pieces)
    for char in "é\U0001f600ï":  # spelled in bytes where a token holds a part of it
        shown = shown.replace("".join(f"\\x{byte:02x}" for byte in char.encode()), char)
    assert shown.strip() == tokenizer.decode(ids).strip() == text


def test_pieces_of_word_pieces_are_cleaned_up_like_the_text():
    tokenizer = tokenizer_kinds.word_piece(["it", "'", "s", "good", "##ness", ".", "a", "[SEP]"], sep="[SEP]")
    ids = tokenizer.convert_tokens_to_ids(["it", "'", "s", "good", "##ness", ".", "[SEP]"])
    tokenizer.clean_up_tokenization_spaces = True
    pieces = sequence_pieces(tokenizer, ids)
    assert pieces[3:] == [" good", "ness", ".", " [SEP]"]
    assert "".join(pieces).strip() == tokenizer.decode(ids)
    assert sequence_pieces(tokenizer, ids[4:6]) == ["ness", "."]  # a window may begin inside a word


def test_parts_of_characters_are_shown_as_bytes():
    tokenizer = tokenizer_kinds.byte_level(["a", "Ġa", "ðŁ", "ĺĢ", "Ċ", "ĠðŁ"])
    ids = tokenizer.convert_tokens_to_ids(["Ġa", "ðŁ", "ĺĢ", "Ċ", "ĠðŁ", "a"])
    assert sequence_pieces(tokenizer, ids) == [" a", "\\xf0\\x9f", "\\x98\\x80", "\n", " \\xf0\\x9f", "a"]
    tokenizer = tokenizer_kinds.sentence_piece(["a", "▁a", "<0xF0>", "<0x0A>"])
    ids = tokenizer.convert_tokens_to_ids(["▁a", "<0xF0>", "a", "<0x0A>"])
    assert sequence_pieces(tokenizer, ids) == [" a", "\\xf0", "a", "\n"]
