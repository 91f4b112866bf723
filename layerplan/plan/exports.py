"""A freeze plan in other tools' words, and theirs as a plan: what each can say, and what it would train.

Every tool picks parameters by a rule over their names. A configuration is handed out only when its rule, followed here, picks
exactly what the plan trains; else the tool is refused with the first parameter it would treat otherwise. The rules are those
of axolotl 0.18 (`unfrozen_parameters`), LLaMA-Factory 0.9.6 (`finetuning_type: freeze`), ms-swift 4.6 (`trainable_parameters`)
and PEFT 0.20 (`layers_to_transform`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from layerplan.errors import PlanError

SWIFT_PATTERNS = ("freeze_parameters_regex", "trainable_parameters_regex")
SWIFT_KINDS = ("tuner_type", "train_type", "sft_type")
"""What ms-swift calls the choice between everything and adapters, since version 4, 3 and 2."""
SWIFT_ACTIVE = ("trainable_parameters", "additional_trainable_parameters")
"""What ms-swift calls the prefixes that train all the same, since version 3 and in version 2."""
CHANGING = {
    "axolotl": ("lisa_n_layers", "lisa_step_interval"),
    "llamafactory": ("use_badam",),
    "ms-swift": ("lisa_activated_layers",),
}
"""Fields by which a tool trains other layers every few steps."""
TIED_BY_PEFT = "embed_tokens"
"""The one name under which PEFT ties its copy of an embedding to the head, and only when it is told to."""
Rule = Callable[[str], bool]
"""Whether a tool trains the parameter of this name."""


@dataclass(frozen=True)
class ParameterNames:
    """A model's parameters under a plan.

    Attributes:
        all: Every name, in the model's order.
        trainable: Those the plan trains.
        layers_path: Where the decoder layers lie, such as `model.layers`.
        num_layers: Decoder layers.
        linear: Names of the linear maps inside a layer, such as `q_proj`; only PEFT asks for them, and for what follows.
        stacked: Parameters inside layers that hold several matrices, as those of experts do.
        tied: Path of the embedding where it and the head are one matrix.
    """

    all: tuple[str, ...]
    trainable: frozenset[str]
    layers_path: str
    num_layers: int
    linear: tuple[str, ...] = ()
    stacked: tuple[str, ...] = ()
    tied: str | None = None

    def prefix_of(self, layer: int) -> str:
        """What the names of a layer's parameters begin with; it ends in a dot, or layer 1 would be 10 to 19 too."""
        return f"{self.layers_path}.{layer}."

    def list_whole_layers(self) -> list[int]:
        """Layers whose every parameter trains."""
        return [layer for layer in range(self.num_layers) if self._of_layer(layer) <= self.trainable]

    def list_prefixes(self) -> list[str]:
        """Prefixes that pick what trains: a whole layer's, and whole names of the rest."""
        layers = self.list_whole_layers()
        within = {name for layer in layers for name in self._of_layer(layer)}
        rest = [name for name in self.all if name in self.trainable - within]
        return [*map(self.prefix_of, layers), *rest]

    def _of_layer(self, layer: int) -> set[str]:
        return {name for name in self.all if name.startswith(self.prefix_of(layer))}


def export_axolotl(names: ParameterNames) -> tuple[str, Rule]:
    """`unfrozen_parameters`: patterns matched at the beginning of a name, whose dots are dots."""
    patterns = [f"^{prefix}" if prefix.endswith(".") else f"^{prefix}$" for prefix in names.list_prefixes()]
    values = {"unfrozen_parameters": patterns}
    return _dump(values), read_axolotl(values)


def read_axolotl(values: Mapping[str, Any]) -> Rule:
    """The rule of an axolotl configuration, which trains everything where it names nothing.

    Raises:
        PlanError: For one that trains adapters or rows of a matrix, or whose layers it does not say.
    """
    if values.get("adapter"):
        raise PlanError(f"adapter={values['adapter']!r}: trains adapters, not parameters of the model")
    plugin = next((name for name in _get_list(values, "plugins") if "spectrum" in name.lower()), None)
    chooses = f"plugins: {plugin}" if plugin else "spectrum_top_fraction"
    if plugin or values.get("spectrum_top_fraction"):
        raise PlanError(
            f"{chooses}: axolotl measures the model when it starts and chooses then; read the list of"
            " unfrozen_parameters that Spectrum writes"
        )
    _refuse_changing(values, "axolotl")
    if not values.get("unfrozen_parameters"):
        return lambda name: True
    patterns = _get_list(values, "unfrozen_parameters")
    ranged = [pattern for pattern in patterns if re.search(r"\[[0-9]*(:[0-9]*)?\]$", pattern)]
    if ranged:
        raise PlanError(f"unfrozen_parameters: {ranged[0]!r} trains some rows of a matrix, which a plan cannot say")
    compiled = [_compile(re.sub(r"\.(?!\+)", r"\\.", pattern), "unfrozen_parameters") for pattern in patterns]
    return lambda name: any(pattern.match(name) for pattern in compiled)


def export_llamafactory(names: ParameterNames) -> tuple[str, Rule]:
    """`freeze_trainable_layers`: the last n, or with a minus the first n; other modules by a part of their name."""
    layers, count = names.list_whole_layers(), names.num_layers
    if layers == list(range(count - len(layers), count)):
        number = len(layers)
    elif layers == list(range(len(layers))):
        number = -len(layers)
    else:
        raise PlanError(f"llamafactory: trains the first or the last layers of a model, not layers {layers}")
    inside = tuple(map(names.prefix_of, range(count)))
    extra = sorted({name.split(".")[-2] for name in names.trainable if not name.startswith(inside)})
    values: dict[str, Any] = {
        "finetuning_type": "freeze",
        "freeze_trainable_layers": number,
        "freeze_trainable_modules": "all",
    }
    values |= {"freeze_extra_modules": ",".join(extra)} if extra else {}
    return _dump(values), read_llamafactory(values, num_layers=count)


def read_llamafactory(values: Mapping[str, Any], *, num_layers: int) -> Rule:
    """The rule of a LLaMA-Factory configuration: a name trains when it holds `.index.` or an extra module's name."""
    _refuse_changing(values, "llamafactory")
    if values.get("finetuning_type") == "full":
        return lambda name: True
    if values.get("finetuning_type") != "freeze":
        raise PlanError(f"finetuning_type={values.get('finetuning_type')!r}: `freeze` or `full` is expected")
    if values.get("use_llama_pro"):
        raise PlanError("use_llama_pro=true: trains layers that it inserts, which a plan for the base cannot say")
    number = values.get("freeze_trainable_layers", 2)
    if not isinstance(number, int) or isinstance(number, bool):
        raise PlanError(f"freeze_trainable_layers={number!r}: a whole number is expected")
    layers = range(max(0, num_layers - number), num_layers) if number > 0 else range(min(-number, num_layers))
    modules = _split(values.get("freeze_trainable_modules") or "all")
    parts = [f".{layer}.{'' if module == 'all' else module}" for layer in layers for module in modules]
    parts += _split(values.get("freeze_extra_modules") or "")
    return lambda name: any(part in name for part in parts)


def export_swift(names: ParameterNames) -> tuple[str, Rule]:
    """`trainable_parameters` over everything frozen: prefixes of names."""
    prefixes = names.list_prefixes()
    values = {"tuner_type": "full", "freeze_parameters_ratio": 1.0, "trainable_parameters": prefixes}
    return _dump(values), read_swift(values)


def read_swift(values: Mapping[str, Any]) -> Rule:
    """The rule of an ms-swift configuration that freezes by name; a ratio between 0 and 1 depends on sizes."""
    ratio, frozen = _get_ratio(values), tuple(_get_list(values, "freeze_parameters"))
    if 0 < ratio < 1:
        raise PlanError(
            f"freeze_parameters_ratio={ratio}: cuts between parameters by their sizes; only 0 and 1 are read"
        )
    kind, chosen = next(((key, values[key]) for key in SWIFT_KINDS if values.get(key)), (SWIFT_KINDS[0], "lora"))
    if chosen != "full":
        left_out = "" if values.get(kind) else ", which ms-swift takes where it is left out"
        raise PlanError(f"{kind}={chosen!r}{left_out}: trains adapters; `full` is expected")
    _refuse_changing(values, "ms-swift")
    active = tuple(name for key in SWIFT_ACTIVE for name in _get_list(values, key))
    patterns = [_compile(str(values[key]), key) if values.get(key) else None for key in SWIFT_PATTERNS]

    def rule(name: str) -> bool:
        trains = ratio == 0 and not name.startswith(frozen) if frozen else ratio == 0
        trains = trains and not (patterns[0] and patterns[0].search(name))
        return bool(trains or (active and name.startswith(active)) or (patterns[1] and patterns[1].search(name)))

    return rule


def export_peft(names: ParameterNames) -> tuple[str, Rule]:
    """LoRA on the plan's layers; PEFT trains no base weight of a layer, so this is the plan with other updates."""
    if names.stacked:
        raise PlanError(
            f"peft: {names.stacked[0]} is of several experts at once, which PEFT updates in every layer or in none, by the"
            " model's type"
        )
    inside = tuple(map(names.prefix_of, range(names.num_layers)))
    # whole paths: PEFT looks at how a module's path ends, and `norm` would be every layer's norms too
    whole = sorted({name.rpartition(".")[0] for name in names.trainable if not name.startswith(inside)})
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "target_modules": list(names.linear),
        "layers_to_transform": names.list_whole_layers(),
        "layers_pattern": names.layers_path.split(".")[-1],
    }
    values |= {"modules_to_save": whole} if whole else {}
    if names.tied in whole:
        if names.tied.split(".")[-1] != TIED_BY_PEFT:
            raise PlanError(
                f"peft: trains a copy of {names.tied} and leaves the head, which is the same matrix, as it was"
            )
        values["ensure_weight_tying"] = True
    layers = tuple(map(names.prefix_of, names.list_whole_layers()))
    note = "# LoRA updates of the plan's layers: PEFT trains no base weight in place.\n"
    return note + _dump(values), lambda name: name.startswith(layers) or name.rpartition(".")[0].endswith(tuple(whole))


def export_python(names: ParameterNames) -> tuple[str, Rule]:
    """Lines for any training loop, TRL and the plain Trainer among them, which have no option for it."""
    prefixes = names.list_prefixes()
    listed = "".join(f"    {prefix!r},\n" for prefix in prefixes).replace("'", '"')
    text = f"""TRAINED = (
{listed})
for name, parameter in model.named_parameters():
    parameter.requires_grad_(name.startswith(TRAINED))
"""
    return text, lambda name: name.startswith(tuple(prefixes))


EXPORTS: Mapping[str, Callable[[ParameterNames], tuple[str, Rule]]] = {
    "axolotl": export_axolotl,
    "llamafactory": export_llamafactory,
    "ms-swift": export_swift,
    "peft": export_peft,
    "python": export_python,
}


READ = ("axolotl", "llamafactory", "ms-swift")
"""Tools whose configurations are read back."""


def export_names(names: ParameterNames, tool: str) -> str:
    """The tool's configuration, or lines of code, that train exactly what the plan trains.

    Raises:
        PlanError: When the tool cannot say it; names the first parameter it would treat otherwise.
    """
    if not names.trainable:
        raise PlanError(f"{tool}: the plan trains nothing of this model")
    text, rule = EXPORTS[tool](names)
    for name in names.all:
        if rule(name) != (name in names.trainable):
            does = "trains" if rule(name) else "freezes"
            raise PlanError(f"{tool}: cannot say this plan; its rule {does} {name}, the plan does not")
    return text


def read_rule(values: Mapping[str, Any], tool: str, *, num_layers: int) -> Rule:
    """The rule of a tool's configuration.

    Raises:
        PlanError: When it says what a plan cannot, or the tool's files are not read.
    """
    match tool:
        case "axolotl":
            return read_axolotl(values)
        case "llamafactory":
            return read_llamafactory(values, num_layers=num_layers)
        case "ms-swift":
            return read_swift(values)
    raise PlanError(f"{tool}: its configurations are not read; those of {', '.join(READ)} are")


def _refuse_changing(values: Mapping[str, Any], tool: str) -> None:
    for key in CHANGING[tool]:
        if values.get(key):
            raise PlanError(f"{key}={values[key]!r}: trains other layers every few steps; see `plan.type: rotation`")


def _split(value: Any) -> list[str]:
    """Names in a list, or between commas."""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [part for part in (str(each).strip() for each in parts) if part]


def _get_list(values: Mapping[str, Any], key: str) -> Sequence[str]:
    found = values.get(key) or []
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise PlanError(f"{key}={found!r}: a list of names is expected")
    return found


def _get_ratio(values: Mapping[str, Any]) -> float:
    found = values.get("freeze_parameters_ratio") or 0
    try:
        return float(found)
    except (TypeError, ValueError):
        raise PlanError(f"freeze_parameters_ratio={found!r}: a number is expected") from None


def _compile(pattern: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise PlanError(f"{key}: {pattern!r} is no pattern ({error})") from None


def _dump(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, width=10_000)
