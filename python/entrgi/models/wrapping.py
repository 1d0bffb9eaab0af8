"""A user's model as it is run here: the same weights behind modules of our own.

A denoiser or reward needs evaluation mode, sometimes another attention, a hook or compiled blocks, and no gradient to
weights. None of this may show in the user's model: it may be in training, be wrapped a second time or be in use by
another thread. So what runs is a twin: new module objects in the same tree with the same tensors. It costs no memory
for weights, and an optimiser's step is seen at once.
"""

from __future__ import annotations

import copy
import dis
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from threading import Lock
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

_PARALLEL = {"torch.DistributedDataParallel", "torch.DataParallel"}
_SHARDED = {"torch.FullyShardedDataParallel", "torch.FSDPModule"}
_PEFT = {"peft.PeftModel", "peft.PeftMixedModel"}
# What the wrapper itself does in every call, and would be lost without it.
_PEFT_AT_WORK = ("XLORA", "POLY")
# Of these, a member that comes, goes or is replaced changes what a module does.
_MEMBERS = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
_BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_DEPTH = 4  # of containers in attributes that are searched for modules
_OF_FUNCTIONS = ("__defaults__", "__kwdefaults__", "__dict__")
# Of a module compiled by itself: bound to the module inside it, and made anew with the twin of that.
_COMPILED = ("forward", "_forward", "dynamo_ctx")


def check_tokenizer(argument: str, tokenizer: object) -> None:
    """Raise ValueError for what is no tokenizer of transformers, as a model in its place."""
    if isinstance(tokenizer, nn.Module) or not all(hasattr(tokenizer, name) for name in ("decode", "pad_token_id")):
        raise ValueError(f"{argument}: expected a tokenizer, got {_shown(tokenizer)}")


def unwrap_pretrained(argument: str, model: object) -> PreTrainedModel:
    """:func:`unwrap`, of a model of transformers.

    Raises:
        ValueError: also for anything else, and for BigBird's sparse attention.
    """
    model = unwrap(argument, model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{argument}: expected a model of transformers, got {_shown(model)}")
    if getattr(model.config, "attention_type", None) == "block_sparse":
        raise ValueError(
            f"{argument}: {type(model).__name__} has attention_type 'block_sparse', which gives way to full attention "
            "for good after the first short text; expected 'original_full': load it with "
            'attention_type="original_full"'
        )
    return model


def unwrap(argument: str, model: object) -> nn.Module:
    """The model inside what ``torch.compile``, (distributed) data parallelism and peft put around it.

    Adapters stay where they are, in the layers, and are applied as the model's own forward pass does.

    Raises:
        ValueError: for what is no module, a model whose weights are spread over processes, or an adapter that does
            more than change layers.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"{argument}: expected a model, got {_shown(model)}")
    inner: Any = model
    while True:
        kinds = _kinds(inner)
        if "torch.OptimizedModule" in kinds:
            inner = inner._orig_mod
        elif kinds & _PARALLEL:
            inner = inner.module
        elif kinds & _PEFT:
            _check_adapters(argument, inner)
            inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner.base_model.model
        else:
            break
    for module in inner.modules():
        if _kinds(module) & _SHARDED:
            raise ValueError(
                f"{argument}: {type(inner).__name__} is sharded by FSDP, expected a model whose weights are whole: "
                "gather them first, or pass a function that calls the model"
            )
    return inner


def wrapped_layer(module: nn.Module | None) -> nn.Module | None:
    """The layer inside what peft puts in its place; ``module`` itself where there is no such thing."""
    while isinstance(module, nn.Module):
        inner = module._modules.get("base_layer") or module._modules.get("original_module")
        if inner is None:
            break
        module = inner
    return module


def refuse_inference_weights(argument: str, model: nn.Module) -> None:
    """Raise ValueError where weights were made under inference mode: no gradient can pass through them."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_inference():
            raise ValueError(
                f"{argument}: {name!r} of {type(model).__name__} was made under torch.inference_mode(), so no "
                "gradient can pass through it; expected a model loaded outside of it"
            )


def callable_twin(argument: str, function: Callable[..., Any]) -> tuple[Callable[..., Any], Twin | None]:
    """A callable as it is run here: the twin of a module, compiled where the module is; anything else as it is."""
    if not isinstance(function, nn.Module):
        return function, None
    twin = Twin(unwrap(argument, function))
    if "torch.OptimizedModule" in _kinds(function):
        return type(function)(twin.module, function.dynamo_ctx), twin
    return twin.module, twin


class Twin:
    """New module objects in evaluation mode over the tensors of ``source``, which is never changed.

    Parameters that require a gradient are seen through a detached alias, so that no pass records anything for them.
    Configs are copied, so that the twin may have an attention of its own. Hooks of the forward pass are kept, those of
    the backward pass are not. Modules of TorchScript are not followed once they have a twin.

    Attributes:
        source: the user's model.
        module: its twin.
    """

    source: Any
    module: Any

    def __init__(self, source: nn.Module) -> None:
        self._begin(source)
        with torch.inference_mode(False), torch.no_grad():
            self.module = self._twin(source)
        self._take_stock()

    def _begin(self, source: nn.Module) -> None:
        self.source = source
        self._pairs: list[_Pair] = []
        self._twins: dict[int, nn.Module] = {}  # by the source's id: what is paired is alive
        self._aliases: dict[int, nn.Parameter] = {}  # by the parameter's, since tied ones have one
        self._configs: dict[int, object] = {}
        self._callables: dict[int, tuple[Any, Any]] = {}  # by id, those that hold modules and their twins
        self._watched: list[tuple[str, nn.Module]] = []
        self._replaced: str | None = None
        self._lock = Lock()

    def __getstate__(self) -> nn.Module:
        return self.module

    def __setstate__(self, module: nn.Module) -> None:
        """A copy, or what was pickled, stands alone: it has weights of its own and no model to follow."""
        self._begin(module)
        self.module = module
        self._take_stock()

    def refresh(self) -> None:
        """Follow what has changed in ``source``: tensors, modules, hooks and attributes that were replaced.

        What is changed in place needs no refresh. To be called before each use: where nothing has changed, it takes
        less than a microsecond for each module.

        Raises:
            ValueError: where what is watched (see :meth:`watch`) was replaced.
        """
        if self._is_fresh():
            return
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._aliases, self._callables = {}, {}
            for pair in list(self._pairs):
                self._follow(pair)
            self._check_watched()
            self._drop_unreachable()
            self._take_stock()

    def watch(self, *modules: nn.Module) -> None:
        """Name modules of the twin that its user holds on to, or has changed: from now on they cannot be replaced.

        Nor can configs, since the twin's may have another attention.
        """
        names = {id(module): name for name, module in self.module.named_modules()}
        self._watched = [(names[id(module)], module) for module in modules if id(module) in names]

    def _check_watched(self) -> None:
        for name, module in self._watched:
            try:
                same = self.module.get_submodule(name) is module
            except AttributeError:
                same = False
            if not same:
                self._replaced = name
        if self._replaced is not None:  # for good: what is new in it was not followed as it should be
            raise ValueError(
                f"{type(self.source).__name__}: {self._replaced!r} of the model was replaced after it was wrapped, "
                "expected the modules that it had: wrap it again"
            )

    def _take_stock(self) -> None:
        """Lay out side by side what is compared, so that comparing is a single call."""
        self._callables = {}
        now, then, parameters = [], [], []
        sources = [pair.source for pair in self._pairs]
        for pair in self._pairs:
            now += [pair.source.__dict__, *(pair.source.__dict__[name] for name in _MEMBERS)]
            then += [pair.attributes, *(pair.members[name] for name in _MEMBERS)]
            for name, held in pair.held.items():
                now.append(pair.source.__dict__[name])
                then.append(held)
            own, theirs = pair.twin.__dict__["_parameters"], pair.source.__dict__["_parameters"]
            for name, parameter in pair.members["_parameters"].items():
                if parameter is not None:
                    alias = None if own[name] is parameter else own[name]
                    parameters.append((theirs, name, parameter, parameter.requires_grad, alias))
        self._stock = now, then, parameters, sources, list(map(type, sources))

    def _is_fresh(self) -> bool:
        now, then, parameters, sources, types = self._stock
        try:
            if now != then or list(map(type, sources)) != types:
                return False
        except Exception:  # other tensors in place of the same ones, which have no truth value
            return False
        for owner, name, parameter, required, alias in parameters:
            if owner[name] is not parameter or parameter.requires_grad is not required:  # one number may equal another
                return False
            if alias is not None and not _shares(alias, parameter):
                return False
        return True

    def _twin(self, module: Any) -> nn.Module:
        twin = self._twins.get(id(module))
        if twin is not None:
            return twin
        if isinstance(module, torch.jit.ScriptModule):
            jit: Any = torch.jit
            return jit._recursive.wrap_cpp_module(_script_twin(module._c))
        if "torch.OptimizedModule" in _kinds(module):
            twin = type(module)(self._twin(module._orig_mod), module.dynamo_ctx)
        else:
            twin = object.__new__(type(module))
        self._twins[id(module)] = twin
        pair = _Pair(module, twin)
        try:
            self._follow(pair)
        except BaseException:
            del self._twins[id(module)]
            raise
        self._pairs.append(pair)
        if _changes_itself(module):
            twin.forward = _InTurn(twin.forward)
        return twin

    def _drop_unreachable(self) -> None:
        """Forget modules that ``source`` no longer holds, and their weights with them."""
        reached, ahead = set(), [self.source]
        while ahead:
            module = ahead.pop()
            if id(module) not in reached:
                reached.add(id(module))
                ahead += _modules_in(vars(module))
        self._pairs = [pair for pair in self._pairs if id(pair.source) in reached]
        self._twins = {key: twin for key, twin in self._twins.items() if key in reached}

    def _follow(self, pair: _Pair) -> None:
        """Give the twin what is new in its source since the last time; what the twin alone has stays."""
        source, twin, before = pair.source.__dict__, pair.twin.__dict__, pair.attributes
        if type(pair.twin) is not type(pair.source):
            pair.twin.__class__ = type(pair.source)
        made = _COMPILED if "torch.OptimizedModule" in _kinds(pair.source) else ()
        for name in before.keys() - source.keys():
            twin.pop(name, None)
        for name, value in source.items():
            if name in made:
                continue
            if name == "training":
                twin[name] = False
            elif name in _BACKWARD:
                twin[name] = OrderedDict()
            elif name == "_compiled_call_impl":
                twin.setdefault(name, None)
            elif name in _MEMBERS:
                self._follow_members(pair, name, value)
            elif name in _OF_EVERY_MODULE and isinstance(value, dict | set):
                twin.setdefault(name, type(value)()).update(value)
            elif name not in before or before[name] is not value or pair.held.get(name, value) != value:
                if self._watched and isinstance(value, PretrainedConfig) and id(value) not in self._configs:
                    self._replaced = self._name(pair.source)
                twin[name] = self._mapped(value)
                pair.held.pop(name, None)
                if twin[name] is not value and type(value) in (list, dict, OrderedDict, set):
                    pair.held[name] = copy.copy(value)
        pair.held = {name: held for name, held in pair.held.items() if name in source}
        pair.attributes = dict(source)  # last, so that an error comes again

    def _name(self, module: nn.Module) -> str:
        return next((name for name, other in self.source.named_modules() if other is module), type(module).__name__)

    def _follow_members(self, pair: _Pair, name: str, members: dict[str, Any]) -> None:
        own = pair.twin.__dict__.setdefault(name, type(members)())
        before = pair.members.get(name, {})
        for key in before.keys() - members.keys():
            own.pop(key, None)
        for key, value in members.items():
            if name == "_parameters":
                own[key] = self._without_gradient(value, own.get(key))
            elif key not in before or before[key] is not value:
                written = name == "_buffers" and isinstance(value, Tensor) and _changes_itself(pair.source)
                own[key] = value.clone() if written else self._mapped(value)
        pair.members[name] = dict(members)

    def _without_gradient(self, parameter: nn.Parameter | None, known: object) -> object:
        """The parameter, or where it requires a gradient one over the same memory that does not."""
        if type(parameter) is not nn.Parameter or not parameter.requires_grad:  # quantised ones are of their own types
            return parameter
        alias = self._aliases.get(id(parameter), known)
        if alias is parameter or type(alias) is not nn.Parameter or not _shares(alias, parameter):
            alias = nn.Parameter(parameter.detach(), requires_grad=False)
        self._aliases[id(parameter)] = alias
        return alias

    def _mapped(self, value: Any, depth: int = 0) -> Any:
        """``value`` with twins in place of modules; itself where it holds none."""
        if isinstance(value, nn.Module):
            return self._twin(value)
        if isinstance(value, PretrainedConfig):
            return copy.deepcopy(value, self._configs)
        if isinstance(value, MethodType):
            function, owner = self._mapped(value.__func__, depth), self._mapped(value.__self__, depth)
            same = function is value.__func__ and owner is value.__self__
            return value if same else MethodType(function, owner)
        if isinstance(value, functools.partial):
            parts = self._mapped((value.func, value.args, value.keywords), depth)
            new = functools.partial(parts[0], *parts[1], **parts[2])
            new.__dict__.update(self._mapped(value.__dict__, depth))
            return new
        if isinstance(value, FunctionType):
            return self._function(value)
        if _is_plain_callable(value):
            return self._callable(value, depth)
        if depth == _DEPTH:
            return value
        if type(value) in (dict, OrderedDict):
            new = {key: self._mapped(item, depth + 1) for key, item in value.items()}
            return value if all(new[key] is item for key, item in value.items()) else type(value)(new)
        if type(value) in (list, tuple, set):
            items = [(self._mapped(item, depth + 1), item) for item in value]
            return value if all(a is b for a, b in items) else type(value)(a for a, _ in items)
        return value

    def _function(self, function: FunctionType) -> FunctionType:
        """``function`` over twins; cells that hold no module are shared, so that what it counts stays in one place."""
        if id(function) in self._callables:
            return self._callables[id(function)][1]
        self._refuse_globals(function)
        if next(_modules_in(function), None) is None:
            return function
        cells = tuple(CellType() if _holds_module(cell) else cell for cell in function.__closure__ or ())
        new = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
        self._callables[id(function)] = function, new  # before what is in it: it may hold itself
        functools.update_wrapper(new, function, updated=())
        new.__dict__.pop("__wrapped__", None)
        new.__kwdefaults__ = self._mapped(function.__kwdefaults__)
        new.__defaults__ = self._mapped(function.__defaults__)
        new.__dict__.update(self._mapped(function.__dict__))
        for cell, theirs in zip(cells, function.__closure__ or (), strict=True):
            if cell is not theirs:
                cell.cell_contents = self._mapped(theirs.cell_contents)
        return new

    def _callable(self, value: object, depth: int) -> object:
        """An object of a class with ``__call__`` over twins; all else in it is shared."""
        if id(value) in self._callables:
            return self._callables[id(value)][1]
        if next(_modules_in(value), None) is None:
            return value
        new = object.__new__(type(value))
        self._callables[id(value)] = value, new
        new.__dict__.update({name: self._mapped(item, depth) for name, item in value.__dict__.items()})
        return new

    def _refuse_globals(self, function: FunctionType) -> None:
        """Raise ValueError for a function that reaches a module of the model as a global variable."""
        for name in _globals_read(function.__code__):
            held = {id(part) for module in _modules_in(function.__globals__.get(name)) for part in module.modules()}
            if held and not held.isdisjoint(map(id, self.source.modules())):
                raise ValueError(
                    f"{type(self.source).__name__}: {function.__qualname__!r}, a function that it calls, uses the "
                    f"global variable {name!r}, which leads back to the model's own modules; expected them among its "
                    "arguments or in its closure, where they can be replaced"
                )


class _Pair:
    """A module, its twin, and what the module was like when the twin last followed it."""

    __slots__ = ("attributes", "held", "members", "source", "twin")

    def __init__(self, source: nn.Module, twin: nn.Module) -> None:
        self.source, self.twin = source, twin
        self.attributes: dict[str, Any] = {}
        self.members: dict[str, dict[str, Any]] = {}
        self.held: dict[str, Any] = {}  # what was in containers that hold modules


def _shares(alias: Tensor, parameter: Tensor) -> bool:
    """Whether both are the same numbers in the same memory in the same layout."""
    return alias.dtype is parameter.dtype and alias.is_set_to(parameter)


def _changes_itself(module: nn.Module) -> bool:
    """Whether a pass leaves something in the module: rotary frequencies that depend on the sequence's length."""
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds)


class _InTurn:
    """``forward``, by one thread at a time."""

    def __init__(self, forward: Callable[..., object]) -> None:
        self.forward, self.lock = forward, Lock()

    def __call__(self, *arguments: Any, **options: Any) -> object:
        with self.lock:
            return self.forward(*arguments, **options)

    def __reduce__(self) -> tuple[type, tuple[Callable[..., object]]]:
        return _InTurn, (self.forward,)


def _script_twin(module: Any) -> Any:
    """A TorchScript module with the same tensors in evaluation mode; a copy shares what is below it."""
    twin = copy.copy(module)
    for name, child in torch._C.ModuleDict(module).items():
        twin.setattr(name, _script_twin(child))
    if twin.hasattr("training"):
        twin.setattr("training", False)
    return twin


def _modules_in(value: Any, depth: int = 0, seen: set[int] | None = None) -> Iterator[nn.Module]:
    """The modules that :meth:`Twin._mapped` finds in ``value``."""
    seen = set() if seen is None else seen
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, MethodType):
        yield from _modules_in((value.__func__, value.__self__), depth, seen)
    elif isinstance(value, functools.partial):
        yield from _modules_in((value.func, value.args, value.keywords, value.__dict__), depth, seen)
    elif isinstance(value, FunctionType) or _is_plain_callable(value):
        if id(value) not in seen:  # it may hold itself
            seen.add(id(value))
            cells = [_contents(cell) for cell in getattr(value, "__closure__", None) or ()]
            held = _OF_FUNCTIONS if isinstance(value, FunctionType) else ("__dict__",)
            for item in (*cells, *(getattr(value, name) for name in held)):
                yield from _modules_in(item, 0, seen)
    elif type(value) in (dict, OrderedDict, list, tuple, set) and depth <= _DEPTH:
        for item in list(value.values() if isinstance(value, dict) else value):
            yield from _modules_in(item, depth + 1, seen)


def _globals_read(code: CodeType) -> set[str]:
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_globals_read(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _contents(cell: CellType) -> object:
    """None for one that is still empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _holds_module(cell: CellType) -> bool:
    return next(_modules_in(_contents(cell)), None) is not None


def _is_plain_callable(value: object) -> bool:
    """Whether it is an object of a class with ``__call__`` that can be made anew from what is in it."""
    kind = type(value)
    return (
        any(isinstance(cls.__dict__.get("__call__"), FunctionType) for cls in kind.__mro__)
        and not issubclass(kind, type)
        and kind.__new__ is object.__new__
        and hasattr(value, "__dict__")
    )


def _shown(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _kinds(model: nn.Module) -> set[str]:
    return {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(model).__mro__}


def _check_adapters(argument: str, model: Any) -> None:
    for name, config in model.peft_config.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning or kind in _PEFT_AT_WORK or getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"{argument}: adapter {name!r} is of type {kind} and changes more than the model's layers, expected "
                "LoRA or another that changes these alone"
            )
