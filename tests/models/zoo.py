"""Twelve ``transformers`` models as tiny random ones, each with its own spelling of attention.

The weights are drawn wide (:data:`SPREAD`), not at the library's 0.02: with that, all scores are
nearly equal, every weight is about 1/N, and a lost mask or scale would hardly show in the output.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers as hf
from torch import Tensor, nn

__all__ = ["BATCH", "LENGTH", "MODELS", "ZOO", "Inputs", "Model", "Padding"]

# loading the library names each optional package that is not installed
logging.getLogger("transformers").setLevel(logging.ERROR)

Padding = Literal["none", "left", "right"]
Inputs = dict[str, Tensor]

BATCH, LENGTH, PADS = 2, 13, 4
VOCABULARY = 101
SPREAD = 0.3

TEXT: tuple[Padding, ...] = ("none", "left", "right")
IMAGE: tuple[Padding, ...] = ("none",)

#: What every configuration shares: attention written out, nothing random, nothing kept.
COMMON: dict[str, Any] = {"attn_implementation": "eager", "use_cache": False}
WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": SPREAD,
}
TEXT_WIDTHS: dict[str, Any] = {"vocab_size": VOCABULARY, **WIDTHS}
GROUPED: dict[str, Any] = {**TEXT_WIDTHS, "num_key_value_heads": 2, "head_dim": 8}
WINDOW = 5


@dataclass(frozen=True)
class Model:
    """One model: how to build it, what to feed it, and how many attention sites it has.

    ``architecture`` is the library's name of it and ``settings`` what its configuration changes. ``sites``
    was counted by reading the model's source: one for each softmax between a product of two activations
    and another. ``what`` is the part of its spelling that no other model here has.
    """

    name: str
    what: str
    architecture: str
    settings: dict[str, Any]
    inputs: Callable[[Padding, int], Inputs]
    sites: int
    paddings: tuple[Padding, ...] = TEXT

    def make(self, dtype: torch.dtype) -> nn.Module:
        """The model with its random weights in evaluation mode; the same weights on every call."""
        torch.manual_seed(0)
        config = getattr(hf, f"{self.architecture}Config")(**COMMON, **self.settings)
        model: nn.Module = getattr(hf, f"{self.architecture}Model")(config).eval()
        for parameter in model.parameters():
            if not parameter.any():
                # the library starts biases, Swin's table of relative biases too, at zero: nobody would miss them
                nn.init.normal_(parameter, std=SPREAD)
        return model.to(dtype)

    def feed(self, padding: Padding = "none", dtype: torch.dtype = torch.float32, length: int = LENGTH) -> Inputs:
        """Its keyword arguments; floating-point ones in ``dtype``. Without padding, no mask is passed."""
        made = self.inputs(padding, length)
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in made.items()}


def _tokens(length: int, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def _mask(padding: Padding, length: int) -> Tensor:
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, :PADS] = padding != "left"
    mask[1, length - PADS :] = padding != "right"
    return mask


def _text(padding: Padding, length: int) -> Inputs:
    tokens = {"input_ids": _tokens(length)}
    return tokens if padding == "none" else {**tokens, "attention_mask": _mask(padding, length)}


def _text_to_text(padding: Padding, length: int) -> Inputs:
    decoder = {"decoder_input_ids": _tokens(length - 4, seed=2)}
    masked = {} if padding == "none" else {"decoder_attention_mask": _mask(padding, length - 4)}
    return {**_text(padding, length), **decoder, **masked}


def _image(padding: Padding, length: int) -> Inputs:
    return {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(3))}


GEMMA2 = {**GROUPED, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": SPREAD,
    **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": SPREAD}
BERT = {**TEXT_WIDTHS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# T5 divides its spread by the root of the width itself
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "initializer_factor": 2.0,
}
VIT = {**WIDTHS, "image_size": 16, "patch_size": 4}
# 8 x 8 patches in windows of 4 x 4, unshifted and shifted; then 4 x 4 merged patches, which are one window
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 16,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "drop_path_rate": 0.0,
    "initializer_range": SPREAD,
}
# Every expert takes every token: a router near a tie may choose otherwise after any rounding, and that jump
# would drown attention's share of the error. The library's default product of experts has no float64.
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
GPT_OSS = {**GROUPED, **EXPERTS, "sliding_window": WINDOW}

ZOO: tuple[Model, ...] = (
    Model("llama", "grouped heads, finite fill, float32 softmax", "Llama", GROUPED, _text, sites=2),
    Model("mistral", "sliding window", "Mistral", {**GROUPED, "sliding_window": WINDOW}, _text, sites=2),
    Model("qwen3", "query and key normalised", "Qwen3", GROUPED, _text, sites=2),
    Model("gemma2", "softcap, window on every other layer", "Gemma2", GEMMA2, _text, sites=2),
    Model("gpt2", "one projection split in three", "GPT2", GPT2, _text, sites=2),
    Model("gpt-neox", "rotary on a part, interleaved projections", "GPTNeoX", TEXT_WIDTHS, _text, sites=2),
    Model("bloom", "ALiBi through baddbmm, 3-D scores", "Bloom", BLOOM, _text, sites=2),
    Model("bert", "bidirectional, padding only", "Bert", BERT, _text, sites=2),
    # two of self-attention in the encoder, two of each kind in the decoder
    Model("t5", "learned relative bias, no scale, cross-attention", "T5", T5, _text_to_text, sites=6),
    Model("vit", "no mask at all", "ViT", VIT, _image, sites=2, paddings=IMAGE),
    Model("swin", "windows as batch, relative bias, 5-D mask", "Swin", SWIN, _image, sites=3, paddings=IMAGE),
    Model("gpt-oss", "sinks as a column, maximum subtracted, slice", "GptOss", GPT_OSS, _text, sites=2),
)

MODELS: dict[str, Model] = {model.name: model for model in ZOO}
