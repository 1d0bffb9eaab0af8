"""Rotary position embeddings, from every spelling that config.json files use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers

from entrgi.models.fields import is_number

# For each scaling that is computed (by transformers): parameters that must be there, and that may be.
SCALINGS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}


@dataclass(frozen=True)
class Rope:
    """What turns queries and keys.

    Attributes:
        theta: base of the angles.
        type: one of :data:`SCALINGS`.
        parameters: of the scaling, by transformers' names.
    """

    theta: float
    type: str = "default"
    parameters: Mapping[str, float] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """As options of transformers' config classes, of whichever major version is installed."""
        scaling = {"rope_type": self.type, **self.parameters}
        if _is_old():
            return {"rope_theta": self.theta, "rope_scaling": None if self.type == "default" else scaling}
        return {"rope_parameters": {"rope_theta": self.theta, **scaling}}


def read_rope(argument: str, fields: Mapping[str, Any], supported: tuple[str, ...] = tuple(SCALINGS)) -> Rope:
    """The rotary embedding that the fields of a config.json describe.

    They may stand in ``rope_parameters`` (transformers 5; there also by layer type), in ``rope_scaling`` (its kind
    as ``rope_type`` or ``type``) and ``rope_theta``, or in several of these at once. What is said twice has to be
    the same; null, and an empty scaling, say nothing.

    Args:
        argument: what to call the model in an error.
        supported: kinds of scaling to accept.

    Raises:
        ValueError: without a base, for values that contradict each other or are not numbers, and for a scaling
            that is not ``supported`` or has parameters that are not understood.
    """
    said: dict[str, tuple[str, Any]] = {}  # value and where it stands, by parameter

    def say(place: str, name: str, value: object) -> None:
        before, earlier = said.setdefault(name, (place, value))
        if earlier != value:
            raise ValueError(
                f"{argument}: config.json has {before} {fields[before]!r} and {place} {fields[place]!r}, "
                f"expected the same {name} in both"
            )

    for place in ("rope_parameters", "rope_scaling"):
        for name, value in _entries(argument, place, fields).items():
            say(place, name, value)
    if fields.get("rope_theta") is not None:
        say("rope_theta", "rope_theta", _number(argument, "rope_theta", fields, "rope_theta", fields["rope_theta"]))
    if "rope_theta" not in said:
        raise ValueError(f"{argument}: config.json has no 'rope_theta'")
    place, kind = said.pop("rope_type", ("rope_parameters", "default"))
    parameters = {name: value for name, (_, value) in said.items() if name != "rope_theta"}
    if kind not in SCALINGS or kind not in supported:
        raise ValueError(
            f"{argument}: config.json has {place} {fields.get(place)!r}, expected one of rope_type "
            f"{', '.join(supported)}: nothing else is supported"
        )
    outside = fields.get("original_max_position_embeddings")
    if outside is not None and kind in ("llama3", "yarn"):
        name = "original_max_position_embeddings"
        say(name, name, _number(argument, name, fields, name, outside))
        parameters[name] = said[name][1]
    required, optional = SCALINGS[kind]
    for name in required:
        if name not in parameters:
            raise ValueError(
                f"{argument}: config.json has {place} {fields.get(place)!r}, expected {name!r} for rope_type {kind!r}"
            )
    for name in parameters.keys() - {*required, *optional}:
        where = said[name][0]
        raise ValueError(
            f"{argument}: config.json has {where} {fields[where]!r}, expected no {name!r} for rope_type {kind!r}: "
            "it is not understood"
        )
    return Rope(said["rope_theta"][1], kind, parameters)


def settle_rope(argument: str, part: dict[str, Any]) -> None:
    """Make one of several spellings in a (sub-)config that transformers is to read, in place.

    transformers 5 takes ``rope_scaling`` where both are given and loses what ``rope_parameters`` says; 4 does not
    know ``rope_parameters``.

    Raises:
        ValueError: where they contradict each other.
    """
    said: dict[str, Any] = {}
    given = [name for name in ("rope_parameters", "rope_scaling") if isinstance(part.get(name), dict) and part[name]]
    if any(isinstance(value, dict) for name in given for value in part[name].values()):  # by layer type
        if _is_old() and "rope_parameters" in given:
            raise ValueError(f"{argument}: config.json has rope_parameters by layer type, which need transformers 5")
        return
    for place in (*given, "rope_theta"):
        entries = part[place] if place in given else {place: part.get(place)}
        for name, value in entries.items():
            name = "rope_type" if name == "type" else name
            if value is not None and said.setdefault(name, value) != value:
                raise ValueError(
                    f"{argument}: config.json has {' and '.join(f'{name} {part[name]!r}' for name in given)} and "
                    f"rope_theta {part.get('rope_theta')!r}, expected the same {name} in all"
                )
    if not given or (len(given) == 1 and not (_is_old() and "rope_parameters" in given)):
        return
    part.pop("rope_scaling", None)
    if _is_old():
        del part["rope_parameters"]
        part["rope_theta"] = said.pop("rope_theta", None)
        if part["rope_theta"] is None:
            del part["rope_theta"]
        part["rope_scaling"] = None if said.get("rope_type", "default") == "default" else said
    else:
        part["rope_parameters"] = said


def _is_old() -> bool:
    return int(transformers.__version__.split(".")[0]) < 5


def _entries(argument: str, place: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What one field says: ``rope_type``, ``rope_theta`` and parameters, checked one by one."""
    given = fields.get(place)
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"{argument}: config.json has {place} {given!r}, expected an object or null")
    given = {name: value for name, value in given.items() if value is not None}
    nested = {name: value for name, value in given.items() if isinstance(value, dict)}
    if nested:  # by layer type
        if len(nested) != len(given) or ("full_attention" not in nested and len(nested) > 1):
            raise ValueError(
                f"{argument}: config.json has {place} {fields[place]!r}, expected one set of values, or one for each "
                "type of layers with 'full_attention' among them"
            )
        given = nested.get("full_attention", next(iter(nested.values())))
        given = {name: value for name, value in given.items() if value is not None}
    kinds = [given.pop(name) for name in ("rope_type", "type") if name in given]
    if len(set(map(str, kinds))) > 1 or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(
            f"{argument}: config.json has {place} {fields[place]!r}, expected one name as rope_type and type"
        )
    entries = {name: _number(argument, place, fields, name, value) for name, value in given.items()}
    if entries.get("partial_rotary_factor") == 1:
        del entries["partial_rotary_factor"]
    if kinds:
        return {"rope_type": kinds[0], **entries}
    if entries.keys() - {"rope_theta"}:
        raise ValueError(
            f"{argument}: config.json has {place} {fields[place]!r}, expected a rope_type beside its parameters"
        )
    return entries


def _number(argument: str, place: str, fields: Mapping[str, Any], name: str, value: Any) -> float | bool:
    """``value`` of the parameter ``name`` in the field ``place``, in the type that transformers expects of it."""
    if name == "truncate":
        fits, expected = isinstance(value, bool), "true or false"
    else:
        finite = is_number(value) and abs(value) < 1e300
        if name == "original_max_position_embeddings":
            fits, expected = finite and value >= 1 and value == int(value), "a whole number >= 1"
            value = int(value) if fits else value
        else:
            lowest = {"factor": 1, "rope_theta": 1}.get(name, 0)
            fits, expected = finite and value >= lowest, f"a finite number >= {lowest}"
            value = float(value) if fits else value
    if not fits:
        raise ValueError(f"{argument}: config.json has {place} {fields[place]!r}, expected {name} to be {expected}")
    return value
