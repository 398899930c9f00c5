"""What config.json of Hugging Face says of a model, and how its models split attention."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import CheckpointError
from .beit_layout import BLOCK_TABLE, SHARED_TABLE
from .exported import as_exported
from .family import Draft, Root, Tensors
from .hf_images import Preprocessing, prepared
from .plain_vit import depth_of, infer_spec

RANK = 66
SOURCE = "huggingface/transformers"
# The blocks of both spellings: what save_pretrained writes, and what the models of version 5 have in memory.
BLOCK = r"(?:encoder\.layer|encoder\.layers|layers|layer|model\.layer)\.(\d+)\."
CLASSIFIERS = dict.fromkeys(
    ("classifier", "cls_classifier", "distillation_classifier", "head"), "classifier head"
)
_PARTS = ("q", "k", "v")
_SPLIT = re.compile(r"(blocks\.\d+\.attn)\.([qkv])\.(weight|bias)")
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
# Options of config.json and the first tensor that a model with them has.
_STATED_PARTS = {
    "num_register_tokens": "reg_token",
    "use_absolute_position_embeddings": "pos_embed",
    "use_relative_position_bias": BLOCK_TABLE,
    "use_shared_relative_position_bias": SHARED_TABLE,
    "layer_scale_init_value": "blocks.0.gamma_1",
    "layerscale_value": "blocks.0.ls1.gamma",
    "qkv_bias": "blocks.0.attn.qkv.bias",
    **{f"{name}_bias": f"blocks.0.attn.{name[0]}.bias" for name in ("query", "key", "value")},
}
_BEITS, _BEITS_BIAS = ("beit", "data2vec-vision"), "blocks.0.attn.q_bias"


# ------------------------------------------------------------------------------------------- tensors


def attention(query: str, key: str, value: str, out: str) -> tuple[tuple[str, str], ...]:
    """Renames of a block's attention from these names (patterns after the block's own)."""
    names = zip((query, key, value), _PARTS, strict=True)
    parts = tuple((rf"{BLOCK}{name}\.(\w+)", rf"blocks.\1.attn.{part}.\2") for name, part in names)
    return (*parts, (rf"{BLOCK}{out}\.(\w+)", r"blocks.\1.attn.proj.\2"))


# On disk the parts of BERT's attention, in memory those of the text models.
ATTENTION = attention(
    r"attention\.(?:attention\.query|q_proj)",
    r"attention\.(?:attention\.key|k_proj)",
    r"attention\.(?:attention\.value|v_proj)",
    r"attention\.(?:output\.dense|o_proj)",
)


def fuse_qkv(tensors: Tensors, without_bias: str = "") -> dict[str, torch.Tensor]:
    """The tensors with query, key and value of every block one below the other.

    ``without_bias`` names parts (``k``) whose bias may be missing where others have one: it is then zero.

    Raises:
        CheckpointError: a block has only some of the three, or other ones than the first block.
    """
    fused = {name: tensor for name, tensor in tensors.items() if not _SPLIT.fullmatch(name)}
    groups: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if found := _SPLIT.fullmatch(name):
            groups.setdefault((found[1], found[3]), {})[found[2]] = tensor
    for (block, kind), parts in groups.items():
        first = groups.get(("blocks.0.attn", kind), {})
        needed = [part for part in _PARTS if part in first or kind == "weight" or part not in without_bias]
        if lacking := [part for part in needed if part not in parts]:
            raise CheckpointError(
                f"{block} has no {lacking[0]}.{kind} (query, key, value: q, k, v); the file is not complete"
            )
        if kind == "bias":
            zeros = torch.zeros_like(next(iter(parts.values())))
            parts = dict.fromkeys(_PARTS, zeros) | parts
        fused[f"{block}.qkv.{kind}"] = torch.cat([parts[part] for part in _PARTS])
    return fused


# ------------------------------------------------------------------------------------------- model


def vision_config(root: Root, tensors: Tensors) -> Mapping[str, Any]:
    """What config.json says of the vision model, or nothing where there is none.

    It may leave out whatever is the default of transformers, even the width. ``tensors`` are the encoder's,
    in timm's or BEiT's names.

    Raises:
        CheckpointError: it is of another model than the weights, or states what they lack.
    """
    config = root.tree.config
    inner = config.get("vision_config")
    config = inner if isinstance(inner, Mapping) else config
    if not {"model_type", "hidden_size"} & config.keys():
        return {}
    dim, depth = tensors["patch_embed.proj.weight"].shape[0], depth_of(tensors)
    stated = config.get("hidden_size", dim), config.get("num_hidden_layers", depth)
    if stated != (dim, depth):
        raise CheckpointError(
            f"the config.json beside the file is of another model: its width and depth are {stated[0]} and "
            f"{stated[1]}, those of the weights {dim} and {depth}; move the file to a folder of its own"
        )
    if lacking := _lacking(config, tensors):
        raise CheckpointError(
            f"config.json says {lacking}, and the file has none; it is not complete, or of another model"
        )
    return config


def _lacking(config: Mapping[str, Any], tensors: Tensors) -> str | None:
    """What config.json states and the tensors do not have, or None."""
    for option, name in _STATED_PARTS.items():
        value = config.get(option)
        if value and name not in tensors:
            return f"{option} {value!r}"
    registers = config.get("num_register_tokens")
    if registers and registers != tensors["reg_token"].shape[1]:
        return f"num_register_tokens {registers!r}"
    kind = config.get("model_type")
    if kind and (kind in _BEITS) != (_BEITS_BIAS in tensors):
        of = "queries and values alone" if kind in _BEITS else "keys too"
        return f"model_type {kind!r}, whose attention has biases for {of}"
    return None


def stated_heads(config: Mapping[str, Any], dim: int) -> tuple[int, str] | None:
    """The number of attention heads in config.json. Raises CheckpointError where it cannot be."""
    heads = config.get("num_attention_heads")
    if heads is None:
        return None
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise CheckpointError(
            f"config.json says {heads!r} attention heads, which do not divide the width {dim}"
        )
    return heads, "config.json"


def stated_eps(config: Mapping[str, Any], default: float) -> float:
    """The epsilon of the norms in config.json, or else the default of transformers for the model.

    Raises:
        CheckpointError: it is no positive number.
    """
    eps = config.get("layer_norm_eps", default)
    if not isinstance(eps, int | float) or eps <= 0:
        raise CheckpointError(f"config.json says layer_norm_eps {eps!r}; expected a small positive number")
    return float(eps)


def stated_activation(config: Mapping[str, Any], default: str) -> str:
    """The activation of the MLP in the words of ``VitArch``. Raises CheckpointError for another one."""
    name = config.get("hidden_act", default)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise CheckpointError(
            f"config.json says the activation {name!r}; known are {', '.join(sorted(_ACTIVATIONS))}"
        )
    return _ACTIVATIONS[name]


def config_note(config: Mapping[str, Any], eps: float, activation: str) -> str:
    """Where norm and activation come from."""
    said = f"norm eps {eps:g} and {ACTIVATIONS[activation]}"
    if config:
        kind = config.get("model_type", "no model_type")
        return f"{said}, from config.json ({kind}) or by the defaults of transformers"
    return f"{said}, the default of transformers, as no config.json is beside the file"


ACTIVATIONS = {"gelu": "exact GELU", "gelu_tanh": "tanh GELU", "quick_gelu": "QuickGELU", "silu": "SiLU"}


# ------------------------------------------------------------------------------------------- drafts


def hf_draft(
    family: str,
    *,
    eps: float,
    activation: str = "gelu",
    preprocessing: Callable[[Root, Mapping[str, Any]], Preprocessing],
    prepare: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    says: tuple[str, ...] = (),
    **fields: Any,
) -> Callable[[Root, Tensors, int | None], Draft]:
    """The draft of a family of transformers whose tensors, once renamed, are a plain vision transformer's.

    Args:
        family: its name.
        eps: of the norms, where config.json is not there (the default of transformers).
        activation: likewise, in the words of transformers.
        preprocessing: from the root and config.json to the family's own, for a file alone.
        prepare: from the renamed tensors, with fused qkv, to timm's layout.
        says: notes for the result.
        fields: go to ``infer_spec``.
    """

    def draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
        tensors = prepare(fuse_qkv(tensors))
        dim = tensors["patch_embed.proj.weight"].shape[0]
        config = vision_config(root, tensors)
        norm_eps, act = stated_eps(config, eps), stated_activation(config, activation)
        spec, notes = infer_spec(
            family,
            tensors,
            heads,
            **{"stated_heads": stated_heads(config, dim), "eps": norm_eps, "activation": act, **fields},
        )
        spec, note = prepared(as_exported(spec, config), root, preprocessing(root, config))
        return Draft(tensors, spec, (*notes, config_note(config, norm_eps, act), note, *says))

    return draft
