"""Write docs/models.md: the module groups of every config class of the installed transformers.

    make docs-models         (or: python docs/write_models.py)

Builds each config class on the meta device with few layers: no weights, no downloads. Keeps the text before the tables,
which is written by hand.
"""

from __future__ import annotations

import argparse
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights
from transformers.models.auto import configuration_auto, modeling_auto

from mols_ds.core.groups import group_table
from mols_ds.errors import MolsConfigError

PAGE = Path(__file__).parent / "models.md"
BEGIN = "<!-- models: written by `make docs-models`, do not edit -->"
LAYERS = 4
"""Layers per stack, or more to have a layer of each kind."""
# In this order: the first class that can be built represents a config.
TASKS = (
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "CTC",
    "RNNT",
    "TDT",
    "TEXT_TO_WAVEFORM",
    "TEXT_TO_SPECTROGRAM",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "MASK_GENERATION",
    "PRETRAINING",
    "SEQUENCE_CLASSIFICATION",
)
DEPTHS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "depth",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "encoder_num_hidden_layers",
    "decoder_num_hidden_layers",
    "num_blocks",
    "layers",
]
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
NEEDED: dict[str, dict[str, Any]] = {  # values that a config class needs in addition to its defaults
    "autoformer": {"prediction_length": 4},
    "esm": {"vocab_size": 33},
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64},
    "informer": {"prediction_length": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 64},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "time_series_transformer": {"prediction_length": 4},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2},
}


class Row(NamedTuple):
    """Result of one model. groups: group -> elements, empty without a table.

    problem: the reason, "" for a model that passes. rules: the rules in the refusal.
    """

    model_type: str
    model: str
    groups: dict[str, int]
    problem: str = ""
    rules: str = ""

    def line(self) -> str:
        """Return the row of the page's tables."""
        if self.groups:
            cell = ", ".join(f"{group} {count:,}" for group, count in self.groups.items())
        elif self.rules:
            cell = f"`{self.rules}`"
        else:
            cell = self.problem
        return f"| `{self.model_type}` | {self.model} | {cell} |"


def _parts(config: Any, seen: set[int]) -> Iterator[Any]:
    """Yield a config and its nested configs."""
    if id(config) not in seen:
        seen.add(id(config))
        yield config
        for value in list(vars(config).values()):
            for inner in value if isinstance(value, list | tuple) else [value]:
                if isinstance(inner, transformers.PretrainedConfig):
                    yield from _parts(inner, seen)


def shrunk(config: Any) -> Any:
    """Reduce the config to few layers, in place. Keep a layer of each kind."""
    for part in _parts(config, set()):
        layers = LAYERS
        for key in KINDS:
            kinds = vars(part).get(key)
            if isinstance(kinds, list | tuple) and all(isinstance(kind, str) for kind in kinds):
                layers = max([layers, *(kinds.index(kind) + 1 for kind in set(kinds))])
        for key in DEPTHS:
            depth = vars(part).get(key)
            if isinstance(depth, int) and not isinstance(depth, bool) and depth > layers:
                setattr(part, key, layers)
        for key in KINDS:
            kinds = vars(part).get(key)
            if isinstance(kinds, list | tuple):
                setattr(part, key, list(kinds)[:layers])
    return config


def classes(model_type: str) -> list[str]:
    """Return the names of a config's model classes, in the order of TASKS; other heads last."""
    found: list[str] = []
    tables = [*(f"MODEL_FOR_{task}_MAPPING_NAMES" for task in TASKS), "MODEL_MAPPING_NAMES"]
    for table in tables:
        named = getattr(modeling_auto, table, {}).get(model_type, ())
        found += [named] if isinstance(named, str) else list(named)
    rest = [name for name in dir(modeling_auto) if name.startswith("MODEL_FOR_") and name.endswith("_MAPPING_NAMES")]
    for table in rest:
        named = getattr(modeling_auto, table).get(model_type, ())
        found += [named] if isinstance(named, str) else list(named)
    return list(dict.fromkeys(found))


def built(model_type: str, name: str) -> nn.Module | str:
    """Return the model on the meta device, or the reason why transformers cannot build it."""
    why = ""
    for small in (True, False):
        try:
            config = configuration_auto.CONFIG_MAPPING[model_type](**NEEDED.get(model_type, {}))
            if model_type == "dbrx":
                config.attn_config.rope_theta = 10000.0  # its model reads this missing field
            with torch.device("meta"), no_init_weights(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model: Any = getattr(transformers, name)(shrunk(config) if small else config)
                model.tie_weights()  # `no_init_weights` skips this too
                return model  # type: ignore[no-any-return]
        except Exception as error:  # transformers raises anything; the page gives the reason
            text = " ".join(str(error).split())
            package = re.search(r"requires the (\w+) library", text)
            why = f"needs {package[1]}" if package else f"{type(error).__name__}: {text[:100]}".replace("|", "/")
    return why


def row(model_type: str, name: str) -> Row:
    """Return the row of one model class."""
    model = built(model_type, name)
    if isinstance(model, str):
        return Row(model_type, name, {}, model)
    try:
        groups = group_table(model).elements
    except MolsConfigError as error:
        return Row(model_type, name, {}, "refused", str(error).partition('"rules": ')[2].partition(" (other:")[0])
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if sum(groups.values()) != total:
        raise AssertionError(f"{name}: {sum(groups.values())} of {total} elements are in a group")
    return Row(model_type, name, groups)


def rows(model_type: str) -> list[Row]:
    """Return the rows of one config class: its first model class that builds, and its sequence classifier."""
    names = classes(model_type)
    if not names:
        return [Row(model_type, "", {}, "no model class of its own: a part of another config")]
    found: list[Row] = []
    for name in names:
        found.append(row(model_type, name))
        if found[-1].groups or found[-1].rules:
            break
    classifier = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model_type)
    kept = [one for one in found if one.groups or one.rules] or found[:1]
    if isinstance(classifier, str) and classifier != kept[0].model:
        kept.append(row(model_type, classifier))
    return kept


def sweep(model_types: Iterable[str]) -> list[Row]:
    """Return the rows of these config classes."""
    return [one for model_type in model_types for one in rows(model_type)]


def model_types() -> list[str]:
    """Return every config class of the installed transformers."""
    return sorted(configuration_auto.CONFIG_MAPPING_NAMES)


def page(text: str, found: Sequence[Row]) -> str:
    """Return the page with new tables."""
    passed = [one for one in found if one.groups]
    refused = [one for one in found if one.rules]
    unbuilt = [one for one in found if not one.groups and not one.rules]
    head = text[: text.index(BEGIN)] + BEGIN
    parts = [
        head,
        f"transformers {transformers.__version__}: {len({one.model_type for one in found})} config classes, "
        f"{len({one.model_type for one in passed})} pass,\n{len({one.model_type for one in refused})} are refused with "
        f"the rules to add, {len({one.model_type for one in unbuilt})} have no class that builds with the defaults.",
        "## Passes",
        "\n".join(["| `model_type` | class | elements per group |", "|---|---|---|", *(o.line() for o in passed)]),
        "## Refused",
        "\n".join(["| `model_type` | class | rules to add |", "|---|---|---|", *(o.line() for o in refused)]),
        "## Not built",
        "\n".join(["| `model_type` | class | reason |", "|---|---|---|", *(o.line() for o in unbuilt)]),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(PAGE.read_text("utf-8"), sweep(model_types())), "utf-8")
