"""The pipeline file: stages by name, what each needs, and where its config comes from.

In a value, `{name}` stands for the output of that stage, `{self}` for the folder of the stage's own
result, and `{pipeline}` for the pipeline's folder, which all its runs share.
Imports no torch, Ray or MLflow.
"""

import importlib.machinery
import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from infra.config import StorageConfig, TrackingConfig
from infra.typed_text import Word, Written
from mae_core.config import StrictConfig
from pipelines.chain.execute import Node, in_order
from pipelines.chain.kinds import KINDS, StageKind
from pipelines.config.loading import Given, load_with_origins
from pipelines.config.sections import NAME_PATTERN
from pipelines.outcome import ConfigError

# A comma only in the name of a sweep's point: {a,b}.tar names two shards.
REFERENCE = re.compile(r"\{([A-Za-z_][\w-]*(?:@[^{}]+)?)\}")
STAGE_NAME = re.compile(r"[a-z][a-z0-9_-]*")
SELF = "self"
PIPELINE = "pipeline"
OWN_PLACES = (SELF, PIPELINE)


class StageSpec(StrictConfig):
    stage: str = ""
    """What runs: a stage of `mae --help`, or a .py file with `Config` and `run`. By default the
    stage with this entry's name."""
    files: tuple[str, ...] = ()
    """Config files, merged from left to right. They are searched from the working folder, then from
    each folder above the pipeline's file."""
    set: dict[str, Annotated[Any, Written]] = Field(default_factory=dict)
    """Values by dotted key, set after the files. `{pretrain}` is the output of stage pretrain."""
    needs: tuple[str, ...] = ()
    """Stages to wait for, such as gates, in addition to those whose output a value names. They do
    not affect the result's key, so that another threshold does not cause retraining."""
    cpus: float | None = Field(default=None, gt=0)
    """CPUs to keep free for the stage; by default what its own `scaling` or `workers` asks for."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs to keep free for the stage, with the same default."""
    retries: int = Field(default=2, ge=0)
    """Number of retries after a failure that may be temporary."""
    timeout_s: float | None = Field(default=None, gt=0)
    """Stop an attempt that takes more seconds than this."""


class PromoteSpec(StrictConfig):
    model: str
    """Name of the registered model in MLflow."""
    metric: str
    """`stage/metric` that decides, such as classify/finetune/top1."""
    stage: str = "pretrain"
    """Stage whose model is promoted."""
    alias: str = "champion"
    """Alias of the version in use."""
    margin: float = Field(default=0.0, ge=0)
    """The new model must be better by more than this."""
    higher_is_better: bool = True
    """Whether a higher metric is better."""
    other_data: Literal["refuse", "replace"] = "refuse"
    """What to do if the model in use was measured on other data, or by another metric."""


class ChainConfig(StrictConfig):
    name: str = Field(pattern=NAME_PATTERN)
    """Name of the pipeline, its MLflow experiment and its folder in the storage."""
    stages: dict[str, StageSpec]
    """Stages by name."""
    promote: PromoteSpec | None = None
    """The gate at the end, which promotes a model."""
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @field_validator("stages")
    @classmethod
    def _names(cls, stages: dict[str, StageSpec]) -> dict[str, StageSpec]:
        for name in stages:
            if not STAGE_NAME.fullmatch(name) or name in (*OWN_PLACES, *ChainConfig.model_fields):
                raise ValueError(f"{name!r} can't be a stage's name: use a-z, 0-9, _ and -")
        if not stages:
            raise ValueError("a pipeline needs at least one stage")
        return stages

    @model_validator(mode="after")
    def _promotes_a_stage(self) -> Self:
        if self.promote is not None:
            for stage in (self.promote.stage, self.promote.metric.partition("/")[0]):
                if stage not in self.stages:
                    raise ValueError(f"promote: there is no stage {stage!r}")
        return self


@dataclass(frozen=True)
class Stage:
    """A stage with its config, in which outputs of other stages are still written `{name}`."""

    name: str
    spec: StageSpec
    kind_name: str
    kind: StageKind
    config: StrictConfig
    file: Path | None = None  # for a stage from outside the package

    @property
    def references(self) -> tuple[str, ...]:
        """The stages whose output it uses."""
        text = json.dumps(self.config.model_dump(mode="json"))
        return tuple(dict.fromkeys(n for n in REFERENCE.findall(text) if n not in OWN_PLACES))

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.spec.needs, *self.references]))

    @property
    def node(self) -> Node:
        cpus, gpus = _resources(self.config)
        return Node(
            self.name,
            self.needs,
            cpus=self.spec.cpus if self.spec.cpus is not None else cpus,
            gpus=self.spec.gpus if self.spec.gpus is not None else gpus,
            retries=self.spec.retries,
            timeout_s=self.spec.timeout_s,
        )


def _resources(config: StrictConfig) -> tuple[float, float]:
    scaling = getattr(config, "scaling", None)
    if scaling is None:
        return float(getattr(config, "workers", 1)), 0.0
    return float(scaling.num_workers * scaling.cpus_per_worker), float(
        scaling.num_workers if scaling.use_gpu else 0
    )


@dataclass(frozen=True)
class Chain:
    config: ChainConfig
    stages: tuple[Stage, ...]  # each after the stages that it needs

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)


def load_chain(file: Path, words: Iterable[str] = (), sweeps: Sequence[str] = ()) -> Chain:
    """Read a pipeline; `words` are `stage.section.key=value`, or `key=value` of the pipeline.

    Args:
        file: The pipeline's file.
        words: Values that override the file's.
        sweeps: `[stage.]key=value,value`; each point of the grid gets its own copy of the stages
            that it changes, and of those after them.

    Raises:
        ConfigError: Names file, stage and key of a mistake.
    """
    own: list[str] = []
    of_stages: list[str] = []
    for word in words:
        (own if _is_of_chain(word) else of_stages).append(word)
    config, origins = load_with_origins(ChainConfig, [file], own)
    source = _Source(file, origins, _stage_values(config, of_stages))
    stages = {name: _build(source, name, spec) for name, spec in config.stages.items()}
    stages = _swept(source, stages, [_parse_sweep(word) for word in sweeps])
    for stage in stages.values():
        for name in stage.references:
            if name not in stages:
                raise ConfigError(
                    f"{file}: stages.{stage.name}: there is no stage {name!r} whose output "
                    f"{{{name}}} could be; the stages are {', '.join(stages)}"
                )
    ordered = in_order([stage.node for stage in stages.values()])
    return Chain(config, tuple(stages[node.name] for node in ordered))


def _is_of_chain(word: str) -> bool:
    return word.partition("=")[0].split(".")[0] in ChainConfig.model_fields


@dataclass(frozen=True)
class _Source:
    """The file and the words from which a pipeline is read."""

    file: Path
    origins: Mapping[str, str]  # origin of the file's values, by dotted key
    words: Mapping[str, Mapping[str, Word]]  # overrides of each stage's values, by dotted key


def _stage_values(config: ChainConfig, words: Iterable[str]) -> dict[str, dict[str, Word]]:
    values: dict[str, dict[str, Word]] = {}
    for word in words:
        key, separator, text = word.partition("=")
        stage, _, inner = key.partition(".")
        if not separator or stage not in config.stages or not inner:
            raise ConfigError(
                f"{word!r}: write STAGE.section.key=value; the stages are "
                f"{', '.join(config.stages)}"
            )
        values.setdefault(stage, {})[inner] = Word(text)
    return values


def _build(
    source: _Source,
    name: str,
    spec: StageSpec,
    swept: Mapping[str, Word] = MappingProxyType({}),
    run_name: str = "",
) -> Stage:
    file = source.file
    kind_name = spec.stage or name
    own_file = _found(file, kind_name) if kind_name.endswith(".py") else None
    if own_file is not None:
        kind = _own_kind(file, name, own_file)
    elif kind_name in KINDS:
        kind = KINDS[kind_name]
    else:
        raise ConfigError(
            f"{file}: stages.{name}.stage: there is no stage {kind_name!r}; there are "
            f"{', '.join(KINDS)}, or give a .py file"
        )
    given: list[Given] = []
    if own_file is None and "name" in kind.config_type.model_fields:  # names its run in MLflow
        own_name = re.sub(r"[^A-Za-z0-9_.-]", "-", run_name or name)
        given.append(Given("name", own_name, str(file)))
    given += _of_set(source, name, spec)
    for values in (source.words.get(name, {}), swept):
        given += [Given(key, text, "command line") for key, text in values.items()]
    if "storage" in kind.config_type.model_fields:
        given.append(Given("storage.root", f"{{{SELF}}}", str(file)))
    try:
        files = [_found(file, x) for x in spec.files]
        config, _ = load_with_origins(kind.config_type, files, given)
    except ConfigError as error:
        raise ConfigError(
            "\n".join(f"stages.{name}: {x}" for x in str(error).splitlines())
        ) from error
    return Stage(name, spec, own_file.stem if own_file else kind_name, kind, config, own_file)


def _of_set(source: _Source, name: str, spec: StageSpec) -> Iterator[Given]:
    """Yield the values of `set`, each once, given by its dotted key or within its section."""
    seen: dict[str, str] = {}
    for key, value in spec.set.items():
        place = f"stages.{name}.set.{key}"
        origin = source.origins.get(place, str(source.file))
        for inner, _ in dotted({key: value}):
            # A point of a sweep has its own name, but the same `set`.
            if inner in seen:
                raise ConfigError(
                    f"{origin} stages.{name}.set: {inner} is in {seen[inner]} already"
                )
            seen[inner] = origin
        yield Given(key, value, origin)


def _found(chain_file: Path, name: str) -> Path:
    """Return the path of a file that a pipeline names, whatever the working folder is.

    It is searched from the working folder, then from each folder above the pipeline's file.
    """
    places = [Path(name), *(folder / name for folder in chain_file.resolve().parents)]
    return next((place for place in places if place.is_file()), places[0])


def _own_kind(chain_file: Path, name: str, file: Path) -> StageKind:
    """Load a stage from outside the package: a file with `Config` and `run(config, *, fresh)`.

    It may also define `DATA_KEYS`, `UNKEYED` and `VERSION`, see StageKind.
    """
    where = f"{chain_file}: stages.{name}.stage={file}"
    module = load_stage_file(file, where)
    config_type = module.Config
    for name_, keys in (("DATA_KEYS", _keys(module)), ("UNKEYED", _keys(module, "UNKEYED"))):
        unknown = [key for key in keys if key.partition(".")[0] not in config_type.model_fields]
        if unknown:
            raise ConfigError(f"{where}: {name_}: Config has no field {unknown[0]!r}")
    return StageKind(
        config_type,
        (module.__doc__ or "").strip().partition("\n")[0],
        (),
        _keys(module),
        ("storage", "tracking", *_keys(module, "UNKEYED")),
        getattr(module, "VERSION", 1),
    )


def _keys(module: Any, name: str = "DATA_KEYS") -> tuple[str, ...]:
    """Return a tuple of keys; a single key may be given without a tuple."""
    keys = getattr(module, name, ())
    return (keys,) if isinstance(keys, str) else tuple(keys)


def load_stage_file(file: Path, where: str | None = None) -> Any:
    """Import the module of a stage from a file.

    Args:
        file: It has `Config` and `run(config, *, fresh)`.
        where: What names the file, for the error.

    Raises:
        ConfigError: There is no such file, it can't be imported, or it is no stage.
    """
    where = where or str(file)
    if not file.is_file():
        raise ConfigError(f"{where}: no such file")
    # Given the loader, because Python guesses none for a file that does not end in .py.
    name = f"mae_stage_{file.stem}"
    loader = importlib.machinery.SourceFileLoader(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic looks up names there
    try:
        loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{where}: can't be imported: {type(error).__name__}: {error}") from error
    config_type = getattr(module, "Config", None)
    if not (isinstance(config_type, type) and issubclass(config_type, StrictConfig)):
        raise ConfigError(f"{where}: needs a class Config(StrictConfig) from mae_core.config")
    if not callable(getattr(module, "run", None)):
        raise ConfigError(f"{where}: needs a function run(config, *, fresh) -> StageResult")
    return module


class _Sweep(StrictConfig):
    key: str
    values: tuple[str, ...]


def base_and_point(name: str) -> tuple[str, str]:
    """Split `pretrain@base_lr=1e-3` into the stage and its point of a sweep, "" for none."""
    base, _, point = name.partition("@")
    return base, point


def _parse_sweep(word: str) -> _Sweep:
    key, separator, text = word.partition("=")
    values = tuple(value.strip() for value in text.split(","))
    if not separator or not key or "" in values or len(set(values)) < len(values):
        raise ConfigError(f"--sweep {word}: write key=value,value with different values")
    return _Sweep(key=key, values=values)


def _swept(source: _Source, stages: dict[str, Stage], sweeps: Sequence[_Sweep]) -> dict[str, Stage]:
    """Copy each stage that a sweep changes, and each after it, for every point of the grid."""
    if not sweeps:
        return stages
    targets = [_target(sweep.key, stages) for sweep in sweeps]
    changed = _with_those_after({stage for stage, _ in targets}, stages)
    result = {name: stage for name, stage in stages.items() if name not in changed}
    for point in itertools.product(*(sweep.values for sweep in sweeps)):
        chosen = [(stage, key, value) for (stage, key), value in zip(targets, point, strict=True)]
        label = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for _, key, value in chosen)
        names = {name: f"{name}@{label}" for name in changed}
        for name in stages:
            if name in changed:
                own = {key: Word(value) for stage, key, value in chosen if stage == name}
                spec = _renamed(stages[name].spec, names)
                stage = _build(source, name, spec, own, names[name])
                # Renamed only now, because a reference may also come from one of its files.
                config = _rename(stage.config.model_dump(mode="json"), names)
                result[names[name]] = replace(
                    stage,
                    name=names[name],
                    config=type(stage.config).model_validate(config),
                )
    return result


def _target(key: str, stages: Mapping[str, Stage]) -> tuple[str, str]:
    """Return the stage and key to sweep: unless given, the first stage with such a field."""
    stage, _, inner = key.partition(".")
    if stage in stages and inner:
        return stage, inner
    for name, candidate in stages.items():
        if _has_field(candidate.config, key):
            return name, key
    raise ConfigError(f"--sweep {key}: no stage has such a field; write STAGE.section.key")


def _has_field(config: object, key: str) -> bool:
    for part in key.split("."):
        if part not in getattr(type(config), "model_fields", {}):
            return False
        config = getattr(config, part)
    return True


def _with_those_after(names: set[str], stages: Mapping[str, Stage]) -> set[str]:
    found = set(names)
    while True:
        after = {name for name, stage in stages.items() if found & set(stage.needs)} - found
        if not after:
            return found
        found |= after


def after(names: Iterable[str], chain: Chain) -> set[str]:
    """Return these stages and all that need them."""
    return _with_those_after(set(names), {stage.name: stage for stage in chain.stages})


def _renamed(spec: StageSpec, names: Mapping[str, str]) -> StageSpec:
    return spec.model_copy(update={"needs": tuple(names.get(need, need) for need in spec.needs)})


def _rename(value: Any, names: Mapping[str, str]) -> Any:
    return substitute(value, {old: f"{{{new}}}" for old, new in names.items()})


def substitute(value: Any, texts: Mapping[str, str]) -> Any:
    """Replace `{name}` by its text in all strings of a JSON value; unknown names stay."""
    if isinstance(value, str):
        return REFERENCE.sub(lambda found: texts.get(found[1], found[0]), value)
    if isinstance(value, Mapping):
        return {key: substitute(inner, texts) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [substitute(inner, texts) for inner in value]
    return value


def dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of each leaf."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
