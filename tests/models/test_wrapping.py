"""Wrapping leaves the user's model alone, follows it, and sees through what other libraries put around it."""

import contextlib
import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from transformers import BigBirdConfig, BigBirdForMaskedLM, BigBirdForSequenceClassification

from entrgi import (
    CallableDenoiser,
    CallableReward,
    LogLikelihoodReward,
    MaskedLM,
    SequenceClassifierReward,
    WeightedReward,
    generate,
)
from entrgi.guidance import optimize_logits
from entrgi.models.wrapping import Twin
from entrgi.prompts import Completion
from support import binding, tiny, wrappers
from support.wrappers import KINDS, OPTIONS, PROMPTS, REWARDS, TRANSFORMERS, appearance, frozen, same_output

accelerate, peft = pytest.importorskip("accelerate"), pytest.importorskip("peft")
TEXTS = [Completion("the movie", "the movie was good", "was good")]


def partly_in_training(model):
    """Modes and requirements that no single call can restore."""
    children = [module for module in model.modules() if isinstance(module, nn.Linear)]
    children[0].eval()
    children[-1].weight.requires_grad_(False)
    return model


def trained(model):
    """One step of an optimiser on whatever the model puts out."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    if isinstance(model, wrappers.Pooling):
        loss = model(torch.randn(2, 3, 8), torch.ones(2, 3)).sum()
    else:
        output = model(input_ids=torch.tensor([[2, 5, 6, 4, 3]])).logits
        loss = (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))).mean()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("name", KINDS)
def test_the_model_stays_as_it_was(name):
    """After construction, a generation, a score, and a generation that ends with an error inside a pass."""
    kind = KINDS[name]
    model = partly_in_training(kind.model())
    before = appearance(model)
    wrapped = kind.make(model)
    assert appearance(model) == before
    kind.generate(wrapped)
    if not kind.is_denoiser:
        wrapped.score(TEXTS)
    assert appearance(model) == before

    def failing(*_arguments):
        raise InterruptedError

    first = next(x for x in wrapped_model(wrapped).modules() if isinstance(x, nn.Linear | nn.LayerNorm))
    with first.register_forward_pre_hook(failing), pytest.raises(InterruptedError):
        kind.generate(wrapped)
    assert appearance(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def wrapped_model(wrapped):
    """The twin."""
    if isinstance(wrapped, WeightedReward):
        wrapped = wrapped.rewards[0]
    return getattr(wrapped, "model", None) or wrapped.function


@pytest.mark.parametrize("name", KINDS)
def test_a_policy_in_training_goes_on_learning(name):
    """Between its steps a generation sees the weights as they are then, and no dropout."""
    kind = KINDS[name]
    model, alone = kind.model(), kind.model()
    wrapped = kind.make(model)
    outputs = []
    for _ in range(3):
        expected = kind.generate(kind.make(frozen(model)))
        outputs.append(kind.generate(wrapped))
        assert same_output(outputs[-1], expected)
        assert model.training
        for each in (model, alone):
            torch.manual_seed(7)  # of the dropout
            trained(each)
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours, theirs), "training as without generations in between"
    assert not same_output(outputs[0], outputs[-1]), "it has learnt something"


@pytest.mark.parametrize("name", KINDS)
def test_no_memory_for_weights(name):
    model = KINDS[name].model()
    twin = wrapped_model(KINDS[name].make(model))
    ours = {name: parameter.data_ptr() for name, parameter in twin.named_parameters()}
    assert ours == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert not any(module.training for module in twin.modules())


@pytest.mark.parametrize("name", REWARDS)
def test_nothing_is_recorded_for_weights(name):
    """Guidance through a model in training keeps as much for its backward as through a frozen one."""
    kind, kept = KINDS[name], []
    for model in (kind.model(), frozen(kind.model())):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            kind.generate(kind.make(model))
        kept.append(sorted(sizes))
        assert all(parameter.grad is None for parameter in model.parameters())
    assert kept[0] == kept[1]
    assert kept[0]


def lora(model, **options):
    """Two linear layers with low-rank adapters that change something."""
    names = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    inner = [name for name in names if "layer" in name or ".h." in name]
    torch.manual_seed(3)
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=[inner[0], inner[-1]], r=2, init_lora_weights=False, **options)
    )


@contextlib.contextmanager
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


AROUND = {
    "peft": lora,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "compile in place": compiled_in_place,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "accelerate": lambda model: accelerate.Accelerator(cpu=True).prepare(model),
    "device_map": lambda model: accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "all": lambda model: torch.compile(nn.parallel.DistributedDataParallel(lora(model)), backend="eager"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.grid(strength=1)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_seen_through(name, around):
    """What stands around a model changes nothing, but for adapters, which count as merged ones do."""
    kind = KINDS[name]
    plain = kind.model()
    if around in ("peft", "all"):
        plain = lora(plain).merge_and_unload()
    expected = kind.generate(kind.make(frozen(plain)))
    with one_process():
        model = AROUND[around](kind.model())
        before = appearance(model)
        output = kind.generate(kind.make(model))
    assert appearance(model) == before
    assert output.texts == expected.texts
    torch.testing.assert_close(output.rewards, expected.rewards, rtol=1e-4, atol=1e-4)


def test_mixed_precision_is_kept():
    """accelerate replaces ``forward`` of the model itself, bound to it."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(KINDS["MaskedLM"].model())
    tokens, positions = torch.tensor([[2, 5, 4, 4, 3]]), torch.tensor([2, 3])
    logits = MaskedLM(model, tiny.tokenizer()).logits(tokens, None, positions)
    with torch.no_grad():
        torch.testing.assert_close(logits, model.eval()(input_ids=tokens).logits[0, positions])


def test_a_compiled_callable_stays_compiled():
    calls = []

    def backend(graph, _inputs):
        return lambda *tensors: calls.append(1) or graph(*tensors)

    model = KINDS["CallableReward"].model()
    reward = KINDS["CallableReward"].make(torch.compile(model, backend=backend))
    reward.score(TEXTS)
    assert calls
    assert model.training


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_an_adapter_is_followed(name):
    """Trained on, switched, disabled, merged and taken back after wrapping."""
    kind = KINDS[name]
    model = lora(kind.model())
    wrapped = kind.make(model)

    def check():
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(kind.generate(wrapped).rewards, kind.generate(kind.make(merged)).rewards)

    first = kind.generate(wrapped).rewards
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    assert not torch.equal(kind.generate(wrapped).rewards, first)
    check()
    torch.manual_seed(5)
    model.add_adapter("second", peft.LoraConfig(target_modules=["nothing", *targets(model)], init_lora_weights=False))
    model.set_adapter("second")
    check()
    with model.disable_adapter():
        expected = kind.generate(kind.make(frozen(model.get_base_model()))).rewards
        torch.testing.assert_close(kind.generate(wrapped).rewards, expected)
    model.set_adapter("default")
    model.merge_adapter()
    check()
    model.unmerge_adapter()
    check()


def targets(model):
    return [name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]


def test_adapters_of_the_head_and_of_the_embedding():
    kind = KINDS["MaskedLM"]
    config = peft.LoraConfig(target_modules=["decoder", "word_embeddings"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(kind.model(), config)
    tokens, positions = torch.tensor([[2, 5, 4, 4, 3]]), torch.tensor([2, 3])
    logits = kind.make(model).logits(tokens, None, positions)
    with torch.no_grad():
        torch.testing.assert_close(logits, frozen(model)(input_ids=tokens).logits[0, positions])


@pytest.mark.parametrize("module", ["embed_tokens", "score"])
@pytest.mark.parametrize("way", ["lora", "modules_to_save"])
def test_adapters_of_a_rewards_ends(way, module):
    """They change nothing yet where the reward is made, and something once they are trained."""
    if way == "lora":
        options = {"target_modules": [module]}
    else:
        options = {"target_modules": ["q_proj"], "modules_to_save": [module]}
    model = peft.get_peft_model(KINDS["classifier qwen3"].model(), peft.LoraConfig(r=2, **options))
    reward = KINDS["classifier qwen3"].make(model)
    before = reward.score(TEXTS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    expected = KINDS["classifier qwen3"].make(copy.deepcopy(model).merge_and_unload()).score(TEXTS)
    torch.testing.assert_close(reward.score(TEXTS), expected)
    assert not torch.allclose(expected, before)


def test_an_adapter_of_the_output_layer_is_refused_for_a_likelihood():
    model = peft.get_peft_model(
        KINDS["likelihood untied"].model(), peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    )
    with pytest.raises(ValueError, match=r"reward: an adapter changes the output layer of LlamaForCausalLM, expected"):
        KINDS["likelihood untied"].make(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ],
    ids=["prompt", "prefix"],
)
def test_adapters_beside_the_layers_are_refused(config):
    model = peft.get_peft_model(KINDS["likelihood untied"].model(), config)
    with pytest.raises(ValueError, match=r"reward: adapter 'default' is of type \w+_TUNING .*, expected LoRA"):
        KINDS["likelihood untied"].make(model)
    with pytest.raises(ValueError, match=r"denoiser: adapter 'default' is of type"):
        KINDS["Dream"].make(model)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["MaskedLM", "Dream", "CallableDenoiser", "classifier qwen3", "likelihood untied"])
def test_shards_are_refused(name, version):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    kind = KINDS[name]
    with one_process():
        model = kind.model()
        if version == 1:
            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        else:
            fully_shard(model)
        with pytest.raises(ValueError, match=r"(denoiser|reward): \w+ is sharded by FSDP, expected a model whose"):
            kind.make(model)


def replaced_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def replaced_parameters(model):
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(parameter.detach() * 1.5))


def assigned_state(model):
    model.load_state_dict({name: 1.5 * x for name, x in model.state_dict().items()}, assign=True)


def set_free(model):
    model.requires_grad_(False)
    replaced_data(model)
    model.requires_grad_(True)


def hooked(model):
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear | nn.LayerNorm))
    linear.register_forward_hook(lambda _module, _inputs, output: 1.5 * output)


def replaced_module(model):
    name = next(name for name, module in reversed(list(model.named_modules())) if isinstance(module, nn.LayerNorm))
    model.set_submodule(name, nn.Identity())


CHANGES = [replaced_data, replaced_parameters, assigned_state, set_free, hooked, replaced_module]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["MaskedLM", "CallableDenoiser", "classifier bert"])
def test_changes_that_are_not_in_place_are_followed(name, change):
    kind = KINDS[name]
    model = kind.model()
    wrapped = kind.make(model)
    first = kind.generate(wrapped)
    change(model)
    second = kind.generate(wrapped)
    assert same_output(second, kind.generate(kind.make(frozen(model))))
    assert not same_output(first, second)


def copied_body(model):
    name = model.base_model_prefix
    setattr(model, name, copy.deepcopy(getattr(model, name)))


def other_embedding(model):
    model.set_input_embeddings(nn.Embedding(64, model.get_input_embeddings().weight.shape[1]))


def wider_head(model):
    model.set_output_embeddings(nn.Linear(32, 70))


def copied_layer(model):
    """With a config of its own, and so the attention that the twin's is not."""
    layers = model.base_model.encoder.layer if hasattr(model.base_model, "encoder") else model.base_model.layers
    layers[0] = copy.deepcopy(layers[0])


REPLACEMENTS = [(name, change) for name in wrappers.KINDS for change in (copied_body, copied_layer, other_embedding)]
REPLACEMENTS = [
    (name, change)
    for name, change in REPLACEMENTS
    if name not in ("CallableDenoiser", "CallableReward")
    and not (KINDS[name].is_denoiser and change is other_embedding)
    and not (name == "likelihood tied" and change is copied_layer)
]
REPLACEMENTS += [("MaskedLM", wider_head), ("Dream", wider_head), ("likelihood untied", wider_head)]


@pytest.mark.parametrize(("name", "change"), REPLACEMENTS)
def test_what_the_wrapper_holds_on_to_cannot_be_replaced(name, change):
    """An error each time, and none once the model is wrapped again."""
    kind = KINDS[name]
    model = kind.model()
    wrapped = kind.make(model)
    kind.generate(wrapped)
    change(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"was replaced after it was wrapped, .*expected .*: wrap it again"):
            kind.generate(wrapped)
    if change is not wider_head:
        assert same_output(kind.generate(kind.make(model)), kind.generate(kind.make(frozen(model))))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "CallableReward"])
def test_another_dtype_is_followed(name):
    kind = KINDS[name]
    model = kind.model()
    wrapped = kind.make(model)
    kind.generate(wrapped)
    model.bfloat16()
    assert not kind.is_denoiser or wrapped.dtype == torch.bfloat16
    assert same_output(kind.generate(wrapped), kind.generate(kind.make(frozen(model))))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def transposed_in_place(layer):
    layer.weight.data = layer.weight.data.t()


def of_another_class(layer):
    layer.__class__ = Doubled


@pytest.mark.parametrize(
    "change", [transposed_in_place, of_another_class, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm]
)
def test_the_same_memory_read_in_another_way(change):
    layer = nn.Linear(3, 3)
    twin = Twin(layer)
    change(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)
    twin.refresh()
    x = torch.randn(2, 3)
    assert torch.equal(twin.module(x), layer.eval()(x))
    assert not any(parameter.requires_grad for parameter in twin.module.parameters())


def test_lists_of_modules_are_followed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts, self.named = [nn.Linear(2, 2)], {"a": nn.Linear(2, 2)}

        def forward(self, x):
            for part in (*self.parts, *self.named.values()):
                x = part(x)
            return x

    net, x = Net(), torch.ones(2)
    twin = Twin(net)
    for _ in range(2):
        net.parts.append(nn.Linear(2, 2))
        net.named["a"] = nn.Linear(2, 2)
        twin.refresh()
        assert torch.equal(twin.module(x), net(x))
    kept = twin.module.parts
    twin.refresh()
    assert twin.module.parts is kept


@pytest.mark.parametrize(
    "name", ["MaskedLM", "Dream", "LLaDA", "CallableDenoiser", "classifier bert", "likelihood untied"]
)
def test_what_is_no_model_or_no_tokenizer(name):
    kind, tok = KINDS[name], tiny.tokenizer()
    model = kind.model()
    cls, what = type(kind.make(model)), "denoiser" if kind.is_denoiser else "reward"
    for given in (None, model, "bert-base-uncased", tok.backend_tokenizer):
        shown = "None" if given is None else type(given).__name__
        with pytest.raises(ValueError, match=rf"^{what}: expected a tokenizer, got {shown}$"):
            cls(model, given)
    if cls is CallableDenoiser:
        return
    for given in (None, tok):
        shown = "None" if given is None else type(given).__name__
        with pytest.raises(ValueError, match=rf"^{what}: expected a model, got {shown}$"):
            cls(given, model)
    with pytest.raises(ValueError, match=rf"^{what}: expected a model of transformers, got Linear$"):
        cls(nn.Linear(2, 2), tok)


@pytest.mark.parametrize("name", ["MaskedLM", "Dream", "CallableDenoiser"])
@pytest.mark.parametrize("length", [0, -1, True, 2.5, "12"])
def test_a_length_that_is_none(name, length):
    model = KINDS[name].model()
    with pytest.raises(ValueError, match=rf"^denoiser: max_length must be an integer >= 1, got {length!r}$"):
        type(KINDS[name].make(model))(model, tiny.tokenizer(), mask_token_id=4, max_length=length)


def test_no_head_of_a_causal_model():
    with pytest.raises(ValueError, match=r"^denoiser: BertForMaskedLM has no lm_head, expected a .* for a Dream"):
        KINDS["Dream"].make(KINDS["MaskedLM"].model())


@pytest.mark.parametrize("cls", [MaskedLM, SequenceClassifierReward])
def test_attention_that_a_short_text_switches(cls):
    """For all later calls, of whatever length."""
    config = BigBirdConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=1,
        attention_type="block_sparse",
    )
    build = BigBirdForMaskedLM if cls is MaskedLM else BigBirdForSequenceClassification
    model = build(config)
    with pytest.raises(ValueError, match=rf"{build.__name__} has attention_type 'block_sparse', .* load it with"):
        cls(model, tiny.tokenizer())
    config.attention_type = "original_full"
    cls(build(config).eval(), tiny.tokenizer())


def test_a_parameter_of_one_number_that_equals_the_one_before():
    layer = nn.Linear(1, 1, bias=False)
    twin = Twin(layer)
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    twin.refresh()
    with torch.no_grad():
        layer.weight.add_(1)
    assert torch.equal(twin.module.weight, layer.weight)


def test_attributes_lead_to_twins():
    """Lists, bound methods and partial functions of modules, and a module that is in two places."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Dropout(0.5)
            self.plain = [self.b]
            self.method = self.b.forward
            self.again = self.a
            self.nested = {"x": (self.a, 3)}

        def forward(self, x):
            return self.plain[0](x) + self.method(x)

    source = Odd()
    twin = Twin(source).module
    assert twin.plain[0] is twin.b
    assert twin.method.__self__ is twin.b
    assert twin.again is twin.a is twin.nested["x"][0]
    assert twin.a is not source.a
    assert source.plain == [source.b]
    assert torch.equal(twin(torch.ones(2)), 2 * torch.ones(2))


def compiled_child(model):
    model.get_submodule("bert.encoder.layer")[0] = torch.compile(model.bert.encoder.layer[0], backend="eager")


def compiled_regions(model):
    return accelerate.utils.compile_regions(model, backend="eager")


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


def patched_forward(model):
    old = model.forward
    model.forward = lambda *arguments, **options: old(*arguments, **options)


def decorated_forward(model):
    """A decorator's function with another inside, which is also in its defaults and ``__wrapped__``."""

    def decorator(function):
        @functools.wraps(function)
        def inner(*arguments, _function=function, **options):
            return _function(*arguments, **options)

        return inner

    model.bert.forward = decorator(decorator(model.bert.forward))


def hook_over_a_module(model):
    dropout = model.bert.encoder.layer[0].output.dropout
    model.bert.embeddings.register_forward_hook(lambda _module, _inputs, output: dropout(output))


def hook_of_a_class(model):
    class Hook:
        def __init__(self, module):
            self.module = module

        def __call__(self, _module, _inputs, output):
            return self.module(output)

        def method(self, _module, _inputs, output):
            return self.module(output)

    dropout = model.bert.encoder.layer[0].output.dropout
    model.bert.embeddings.register_forward_hook(Hook(dropout))
    model.bert.encoder.register_forward_pre_hook(lambda _module, inputs: (dropout(inputs[0]), *inputs[1:]))
    model.bert.encoder.layer[0].attention.output.register_forward_hook(Hook(dropout).method)


def replaced_by_itself(model):
    """A function that holds itself."""
    old = model.bert.encoder.forward

    def forward(*arguments, again=True, **options):
        return forward(*arguments, again=False, **options) if again else old(*arguments, **options)

    model.bert.encoder.forward = forward


INSIDE = [compiled_child, compiled_regions, compiled_forward, patched_forward, decorated_forward]
INSIDE += [hook_over_a_module, replaced_by_itself]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.grid(strength=1)
@pytest.mark.parametrize("change", INSIDE)
@pytest.mark.parametrize("name", ["MaskedLM", "classifier bert"])
def test_modules_inside_of_functions(name, change):
    """The twin's run, without dropout, and not the user's in training."""
    kind = KINDS[name]
    model, plain = kind.model(), kind.model()
    model = change(model) or model
    if change is hook_over_a_module:
        change(plain)
    ran = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _inputs: ran.append(module.training))
    assert same_output(kind.generate(kind.make(model)), kind.generate(kind.make(plain.eval())))
    assert ran
    assert not any(ran)
    assert model.training


def test_modules_inside_of_hooks_that_are_objects():
    model = KINDS["classifier bert"].model()
    hook_of_a_class(model)
    reward = KINDS["classifier bert"].make(model)
    assert torch.equal(reward.score(TEXTS), reward.score(TEXTS))
    assert torch.equal(
        reward.score(TEXTS), KINDS["classifier bert"].make(KINDS["classifier bert"].model()).score(TEXTS)
    )


def test_what_a_hook_counts_stays_in_one_place():
    """Only the cells that lead to modules are new."""
    count = 0

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Dropout(0.5)

        def forward(self, x):
            return self.a(x)

    net = Net()

    def hook(_module, _inputs, output):
        nonlocal count
        count += 1
        return net.a(output)

    net.register_forward_hook(hook)
    twin = Twin(net)
    assert torch.equal(twin.module(torch.ones(99)), torch.ones(99))
    assert count == 1
    assert net.training


def test_a_module_behind_a_global_variable_is_refused():
    model = KINDS["MaskedLM"].model()
    scope = {"old": model.forward, "model": 3}
    exec("def forward(*a, **k):\n    return old(*a, **k)", scope)
    model.forward = scope["forward"]
    with pytest.raises(ValueError, match=r"BertForMaskedLM: 'forward', a function .* global variable 'old', which"):
        MaskedLM(model, tiny.tokenizer())
    scope = {"forward": model}
    exec("hook = lambda module, _: module.forward and None", scope)
    del model.forward
    model.register_forward_pre_hook(scope["hook"])
    MaskedLM(model, tiny.tokenizer())  # an attribute of that name


@pytest.mark.filterwarnings("ignore")
def test_torchscript_and_fx():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.d, self.o = nn.Embedding(64, 8), nn.Dropout(0.5), nn.Linear(8, 64)

        def forward(self, tokens, mask):
            return self.o(self.d(self.e(tokens)))

    net = Net()
    tokens, positions = torch.tensor([[2, 5, 4, 4, 3]]), torch.tensor([2, 3])
    expected = frozen(net)(tokens, None)[0, positions]
    for model in (torch.jit.script(net), torch.fx.symbolic_trace(net)):
        denoiser = CallableDenoiser(model, tiny.tokenizer(), 64)
        assert model.training
        assert model.d.training
        if isinstance(model, torch.jit.ScriptModule):  # a trace has its dropout written into it
            assert torch.equal(denoiser.logits(tokens, None, positions), expected)
        pointers = [p.data_ptr() for p in net.parameters()]
        assert [p.data_ptr() for p in denoiser.function.parameters()] == pointers


@pytest.mark.parametrize("name", KINDS)
def test_compile_is_of_the_twin(name, monkeypatch):
    kind = KINDS[name]
    monkeypatch.setattr(nn.Module, "compile", lambda module: module.register_buffer("compiled", None))
    model = kind.model()
    before = appearance(model)
    cls = type(kind.make(model))
    if cls in (CallableDenoiser, CallableReward, WeightedReward):
        pytest.skip("it has no option to compile")
    options = {"mask_token_id": 4} if kind.is_denoiser else {}
    wrapped = cls(model, tiny.tokenizer(), compile=True, **options)
    assert any("compiled" in module._buffers for module in wrapped.model.modules())
    assert appearance(model) == before


MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad, "enable_grad": torch.enable_grad}


@pytest.mark.grid(strength=1)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", KINDS)
def test_in_any_mode(name, mode):
    """Made and used inside of the mode, in training outside of it."""
    kind = KINDS[name]
    expected = kind.generate(kind.make(frozen(kind.model())))
    model = kind.model()
    with MODES[mode]():
        wrapped = kind.make(model)
        output = kind.generate(wrapped)
        score = None if kind.is_denoiser else wrapped.score(TEXTS)
    assert same_output(output, expected)
    assert same_output(kind.generate(wrapped), expected)
    if score is not None:
        assert torch.equal(score, wrapped.score(TEXTS))
    trained(model)


@pytest.mark.parametrize("name", REWARDS)
def test_bound_under_inference_mode(name):
    """And differentiated outside of it."""
    kind = KINDS[name]
    places = binding.layouts(["the movie", "w1"], [4, 3])
    ids, bound = binding.tokens(places, 2), []
    for mode in (contextlib.nullcontext, torch.inference_mode):
        model = kind.model()
        with mode():
            bound.append(kind.make(model).bind(binding.denoiser(), places, 2))
        assert not bound[-1].embedding.is_inference()
    for got, expected in zip(*(binding.value_and_gradient(each, ids) for each in bound), strict=True):
        assert torch.equal(got, expected)


def test_made_under_inference_mode_with_frequencies_of_its_own():
    """longrope writes into them in every pass."""
    model = longrope()
    with torch.inference_mode():
        reward = KINDS["classifier qwen3"].make(model)
    assert reward.score(TEXTS).isfinite().all()


@pytest.mark.parametrize("name", REWARDS)
def test_hooks_of_the_backward_pass_are_the_users(name):
    """Of what trains the model, not of guidance through it."""
    kind, calls = KINDS[name], []
    model = kind.model()
    for module in model.modules():
        module.register_full_backward_hook(lambda *_arguments: calls.append(1))
    kind.generate(kind.make(model))
    assert not calls
    trained(model)
    assert calls


@pytest.mark.parametrize("name", KINDS)
def test_weights_made_under_inference_mode(name):
    """A denoiser runs them; through a reward no gradient could pass."""
    kind = KINDS[name]
    with torch.inference_mode():
        model = kind.model()
    if kind.is_denoiser:
        assert same_output(kind.generate(kind.make(model)), kind.generate(kind.make(frozen(kind.model()))))
        return
    with pytest.raises(ValueError, match=r"reward: '[\w.]+' of \w+ was made under torch.inference_mode\(\)"):
        kind.make(model)


@pytest.mark.parametrize("inside", [True, False], ids=["called inside", "called outside"])
@pytest.mark.parametrize("made", [torch.inference_mode, contextlib.nullcontext])
@pytest.mark.parametrize("guidance", ["entrgi", "gumbel"])
def test_optimize_logits_under_inference_mode(guidance, made, inside):
    def tensors():
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(3, 70, generator=generator)[:, :64]  # with room between its rows
        embedding = torch.randn(64, 8, generator=generator)
        buffer = torch.randn(2, 4, 8, generator=generator)
        tokens = torch.randint(64, (2, 4), generator=generator)
        keys = torch.randint(9, (3, 4), generator=generator)
        return logits, embedding, buffer, torch.tensor([1, 2, 6]), tokens, keys, torch.zeros(1, dtype=torch.int32)

    def run(logits, embedding, buffer, rows, tokens, keys, flag):
        options = {"keys": keys, "guidance": guidance, "error_flag": flag}
        trace = optimize_logits(logits, embedding, buffer, rows, tokens, lambda x, _: x.sin().sum((1, 2)), **options)
        return logits, buffer, trace.rewards, trace.weights

    expected = run(*tensors())
    with made():
        given = tensors()
    with torch.inference_mode() if inside else contextlib.nullcontext():
        got = run(*given)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_a_generation_whose_reward_is_in_training_has_its_gradients_alone():
    """The user's own graph over the same weights survives a generation in between."""
    kind = KINDS["classifier bert"]
    model = kind.model().eval()
    loss = model(input_ids=torch.tensor([[2, 5, 3]])).logits.sum()
    kind.generate(kind.make(model))
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "pooler" in name)


@pytest.mark.parametrize("cls", [MaskedLM, SequenceClassifierReward, LogLikelihoodReward])
def test_one_model_in_two_wrappers(cls):
    """A twin of a twin, too: what the first has changed for itself is not in the way of the second."""
    name = {MaskedLM: "MaskedLM", SequenceClassifierReward: "classifier gemma2", LogLikelihoodReward: "likelihood tied"}
    kind = KINDS[name[cls]]
    model = kind.model()
    first, second = kind.make(model), kind.make(model)
    third = kind.make(first.model)
    expected = kind.generate(kind.make(frozen(model)))
    for wrapped in (first, second, third):
        assert same_output(kind.generate(wrapped), expected)


def test_a_model_for_denoising_and_reward_at_once():
    """One body under two heads, in training, is both."""
    torch.manual_seed(0)
    masked, classifier = KINDS["MaskedLM"].model(), KINDS["classifier bert"].model()
    classifier.bert.embeddings.word_embeddings = masked.bert.embeddings.word_embeddings
    expected = generate(
        PROMPTS,
        MaskedLM(frozen(masked), tiny.tokenizer()),
        SequenceClassifierReward(frozen(classifier), tiny.tokenizer()),
        seed=1,
        **OPTIONS,
    )
    pair = MaskedLM(masked, tiny.tokenizer()), SequenceClassifierReward(classifier, tiny.tokenizer())
    assert same_output(generate(PROMPTS, *pair, seed=1, **OPTIONS), expected)


def longrope():
    parameters = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    parameters["original_max_position_embeddings"] = 20
    return wrappers._classifier("llama", rope_parameters=parameters)


@pytest.mark.grid(strength=1)
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda wrapped: pickle.loads(pickle.dumps(wrapped))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("name", [*KINDS, "longrope"])
def test_copies_stand_alone(name, way):
    kind = KINDS.get(name, KINDS["classifier qwen3"])
    model = longrope() if name == "longrope" else kind.model()
    wrapped = kind.make(model)
    expected, copied = kind.generate(wrapped), way(wrapped)
    trained(model)
    assert same_output(kind.generate(copied), expected)
    assert not same_output(kind.generate(wrapped), expected)


def test_what_a_model_has_lost_is_freed():
    """Replaced modules and parameters do not live on in the wrapper."""
    kind = KINDS["classifier bert"]
    model = kind.model()
    reward = kind.make(model)
    replaced = [weakref.ref(model.classifier), weakref.ref(model.classifier.weight)]
    model.classifier = nn.Linear(32, 1)
    reward.score(TEXTS)
    gc.collect()
    assert [ref() for ref in replaced] == [None, None]
