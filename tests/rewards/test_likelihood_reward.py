"""The log-likelihood reward against the model's own loss, and its gradient against dense arithmetic."""

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import T5Config, T5ForConditionalGeneration

from entrgi import LogLikelihoodReward, generate, load_reward
from entrgi.prompts import Completion
from entrgi.rewards import logsumexp
from entrgi.rewards.logsumexp import LogSumExp
from support import architectures, binding, tiny
from support.host_reads import NoHostReads

PROMPTS, WINDOWS, COPIES = ["the movie was w1", "w5"], [7, 4], 2
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
KINDS = [
    ("gpt2", {}, 1e-10),
    ("llama", UNTIED, 1e-5),
    ("qwen3", TIED, 1e-5),
    ("gemma2", {"final_logit_softcapping": 2.0}, 1e-5),
    ("gemma3_text", TIED, 1e-5),
    ("mistral", UNTIED, 1e-5),
    ("opt", TIED, 1e-10),
]


def make(kind, options=None, chat=tiny.CHAT, **arguments):
    return LogLikelihoodReward(architectures.causal_lm(kind, **(options or {})), tiny.tokenizer(chat=chat), **arguments)


def own_loss(model, before, response):
    """Summed log-likelihood of ``response`` by the model's own loss over labels, a mean over the labels."""
    ids = torch.tensor([before + response])
    labels = torch.tensor([[-100] * len(before) + response])
    return -model(input_ids=ids, labels=labels).loss * len(response)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reuse_prefix", [True, False])
@pytest.mark.parametrize(("kind", "options", "close"), KINDS, ids=lambda x: x if isinstance(x, str) else "")
def test_hard_tokens_have_the_models_own_likelihood(kind, options, close, reuse_prefix, normalize):
    reward = make(kind, options, normalize=normalize, reuse_prefix=reuse_prefix)
    places = binding.layouts(PROMPTS, WINDOWS)
    ids = binding.tokens(places, COPIES)
    ids[1, places[0].start + 2] = binding.EOS  # the response's last token: what follows is not judged
    bound = reward.bind(binding.denoiser(), places, COPIES)
    value, gradient = binding.value_and_gradient(bound, ids)
    expected = []
    for row, place in zip(ids.tolist(), [p for p in places for _ in range(COPIES)], strict=True):
        before, _ = reward.reader.format.frame(place.prompt, place.before)
        response = row[place.start : place.stop]
        response = response[: response.index(binding.EOS) + 1] if binding.EOS in response else response
        expected.append(own_loss(reward.model, before, response) / (len(response) if normalize else 1))
    # transformers takes its loss in float32.
    torch.testing.assert_close(value, torch.stack(expected).to(value), rtol=max(close, 2e-6), atol=1e-6)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(("kind", "options", "close"), KINDS, ids=lambda x: x if isinstance(x, str) else "")
def test_relaxed_tokens_and_their_gradient(kind, options, close):
    """Soft tokens against the same formula with dense logits and autograd throughout."""
    reward, dense = make(kind, options), make(kind, options, reuse_prefix=False)
    places = binding.layouts(PROMPTS, WINDOWS)
    bound = reward.bind(binding.denoiser(), places, COPIES)
    rows = binding.window_rows(bound, places, COPIES)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(len(rows), 64, generator=generator, dtype=torch.float64).softmax(dim=1).requires_grad_()
    buffer, ids = bound.inputs(binding.tokens(places, COPIES))
    value = bound(buffer.flatten(0, 1).index_copy(0, rows, q @ bound.embedding).view(buffer.shape), ids)
    (gradient,) = torch.autograd.grad(value.sum(), q)

    table, output = (x.full() for x in (dense.reader.tables[0], dense.reader.tables[-1]))
    expected, first = [], 0
    for place in [p for p in places for _ in range(COPIES)]:
        length = place.stop - place.start
        window, first = q[first : first + length], first + length
        before = torch.tensor(dense.reader.format.frame(place.prompt, place.before)[0])
        embeds = torch.cat([dense.model.get_input_embeddings()(before), known(window) @ table])[None]
        hidden = dense.head.backbone.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[
            0, len(before) - 1 : -1
        ]
        logits = hidden @ dense.model.lm_head.weight.T
        judged = (hidden * (known(window) @ output)).sum(dim=1)
        if dense.head.softcap is not None:
            logits, judged = (dense.head.softcap * torch.tanh(x / dense.head.softcap) for x in (logits, judged))
        expected.append((judged - logits.logsumexp(dim=1)).mean())
    expected = torch.stack(expected)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), q)
    torch.testing.assert_close(value, expected, rtol=close, atol=close)
    scale = float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient, expected_gradient, rtol=close, atol=close * scale)


def known(q):
    """Ids without a token are read as the unknown one."""
    return torch.cat([q[:, :1], q[:, 1:2] + q[:, 60:].sum(1, keepdim=True), q[:, 2:60], torch.zeros_like(q[:, 60:])], 1)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_logsumexp(softcap, monkeypatch):
    """Value and gradient against autograd, in chunks of three rows."""
    monkeypatch.setattr(logsumexp, "_CHUNK", 3 * 11 + 1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h: LogSumExp.apply(h, weight, softcap), hidden)
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(LogSumExp.apply(hidden, weight, softcap), logits.logsumexp(-1))
    with torch.no_grad():
        torch.testing.assert_close(LogSumExp.apply(hidden, weight, softcap), logits.logsumexp(-1))


class TestScore:
    @pytest.mark.parametrize("normalize", [True, False])
    def test_chat(self, normalize):
        reward = make("gpt2", normalize=normalize, score_batch_size=2)
        completions = [Completion("w1 w2", text, text) for text in ("the movie was good", "bad", "w3 w4")]
        ids = tiny.tokenizer()
        before = ids("user : w1 w2 [SEP] assistant :", add_special_tokens=False)["input_ids"]
        expected = []
        for completion in completions:
            response = ids(completion.response, add_special_tokens=False)["input_ids"]
            expected.append(own_loss(reward.model, before, response) / (len(response) if normalize else 1))
        torch.testing.assert_close(reward.score(completions), torch.stack(expected).float())

    def test_plain_text(self):
        """The prompt's own tokens are not judged."""
        reward = make("gpt2", chat=None)
        completion = Completion("the movie", "the movie was good", "was good")
        expected = own_loss(reward.model, [2, 5, 6], [7, 8]) / 2
        torch.testing.assert_close(reward.score([completion])[0], expected.float())

    def test_response_alone(self):
        reward = make("gpt2", chat=None, include_prompt=False)
        expected = own_loss(reward.model, [2], [7, 8]) / 2
        completion = Completion("the movie", "the movie was good", "was good")
        torch.testing.assert_close(reward.score([completion])[0], expected.float())

    @pytest.mark.parametrize(
        ("text", "response", "judged"),
        [
            ("the movie was", "was", 1),
            ("the movie", "", 1),
            ("the the the", "the", 1),
            ("the w12", "2", 1),  # a token across the boundary counts to the response
            ("w1 w2 w3", "w1 w2 w3", 3),
            ("the movie was", "## was", 1),  # decoded alone, a word piece keeps its mark
        ],
    )
    def test_where_the_response_begins(self, text, response, judged):
        reward = make("gpt2", chat=None)
        ids, begin = reward.reader.ids(Completion("", text, response))
        assert len(ids) - begin == judged
        whole = tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]
        assert ids == [2, *whole, *([3] if not response else [])]

    def test_an_empty_response_is_its_end(self):
        """Guided and scored alike; an empty sum would be the best reward there is."""
        reward = make("gpt2")
        places = binding.layouts(["w1"], [3])
        ids = binding.tokens(places, 1)
        ids[:, places[0].start :] = binding.EOS
        before = reward.reader.format.frame("w1", [])[0]
        expected = own_loss(reward.model, before, [3])
        for pad in (binding.PAD, binding.EOS):
            bound = reward.bind(binding.denoiser(pad=pad), places, 1)
            torch.testing.assert_close(binding.value_and_gradient(bound, ids)[0][0].float(), expected.float())
        torch.testing.assert_close(reward.score([Completion("w1", "", "")])[0], expected.float())

    def test_beyond_the_context(self):
        reward = make("gpt2", chat=None, max_length=6)
        with pytest.warns(UserWarning, match="text of 8 tokens cut to the reward's 6"):
            got = reward.score([Completion("w1 w2", "w1 w2 w3 w4 w5 w6 w7", "w3 w4 w5 w6 w7")])
        torch.testing.assert_close(got, reward.score([Completion("w1 w2", "w1 w2 w3 w4 w5", "w3 w4 w5")]))
        with pytest.raises(ValueError, match=r"7 tokens stand before the response .* context of 6"):
            reward.score([Completion("", "w1 w2 w3 w4 w5 w6 w7", "w7")])


def test_nothing_to_predict_the_first_token_from():
    tok = tiny.tokenizer()
    tok.cls_token = tok.bos_token = None
    reward = LogLikelihoodReward(architectures.causal_lm("gpt2"), tok)
    with pytest.raises(ValueError, match="nothing stands before the response for GPT2LMHeadModel"):
        reward.bind(binding.denoiser(), binding.layouts([""], [3]), 1)
    reward.bind(binding.denoiser(), binding.layouts(["w1"], [3]), 1)
    tok.bos_token = "w9"
    bound = reward.bind(binding.denoiser(), binding.layouts([""], [3]), 1)
    assert bound.sequences.positions[0, 0] == 1


def test_logits_that_are_something_else():
    with pytest.raises(ValueError, match="GPTJForCausalLM has no language-model head without a bias"):
        make("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 40})
    with pytest.raises(ValueError, match="the logits of CohereForCausalLM are not its hidden states times"):
        make("cohere", {"logit_scale": 0.5})
    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration does not take inputs_embeds"):
        LogLikelihoodReward(T5ForConditionalGeneration(config), tiny.tokenizer())


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
@pytest.mark.parametrize("options", [TIED, UNTIED], ids=["tied", "untied"])
def test_nothing_reads_the_device(kind, options):
    bound = make(kind, options).bind(binding.denoiser(), (places := binding.layouts(PROMPTS, WINDOWS)), COPIES)
    ids = binding.tokens(places, COPIES)
    with NoHostReads():
        embeds, columns = bound.inputs(ids)
        leaf = embeds.requires_grad_()
        (gradient,) = torch.autograd.grad(bound(leaf, columns).sum(), leaf)
    assert gradient.abs().sum() > 0


def test_guidance_raises_the_likelihood():
    reward = LogLikelihoodReward(architectures.causal_lm("llama").float(), tiny.tokenizer())
    options = {"max_new_tokens": 8, "steps": 8, "seed": 0, "temperature": 1.0}
    guided = generate(["the movie", "w1"], tiny.denoiser(), reward, **options)
    free = generate(["the movie", "w1"], tiny.denoiser(), reward, guidance="none", **options)
    assert guided.rewards.mean() > free.rewards.mean() + 0.3


def test_from_pretrained(tmp_path):
    original = make("llama", UNTIED)
    original.model.save_pretrained(tmp_path)
    original.tokenizer.save_pretrained(tmp_path)
    completions = [Completion("w1", "w2 w3", "w2 w3")]
    loaded = load_reward(tmp_path, normalize=False)
    assert isinstance(loaded, LogLikelihoodReward)
    torch.testing.assert_close(loaded.score(completions), 2 * original.score(completions))


def test_log_softmax_is_what_the_reward_calls_likelihood():
    """The same number written as textbooks do."""
    reward = make("gpt2", normalize=False)
    before = reward.reader.format.frame("w1", [])[0]
    logits = reward.model(input_ids=torch.tensor([[*before, 20, 21]])).logits[0].double()
    expected = log_softmax(logits[len(before) - 1], -1)[20] + log_softmax(logits[len(before)], -1)[21]
    places = binding.layouts(["w1"], [2])
    ids = binding.tokens(places, 1)
    ids[0, places[0].start : places[0].stop] = torch.tensor([20, 21])
    value, _ = binding.value_and_gradient(reward.bind(binding.denoiser(), places, 1), ids)
    torch.testing.assert_close(value[0], expected, rtol=1e-10, atol=1e-10)
