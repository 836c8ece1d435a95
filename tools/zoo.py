"""Export small networks of many architectures, with random weights, for `tools/coverage.py`.

    python -m venv export && export/bin/pip install torch==2.13.0 transformers onnx onnxscript
    export/bin/python tools/zoo.py OUT [NAME ...]

Each network is written as ``NAME.script.onnx`` (TorchScript, dynamic axes), ``NAME.dynamo.onnx``
(fixed sizes) and ``NAME.dynamic.onnx`` (dynamo, dynamic axes). What an exporter cannot do is
printed and left out. Only this script and `zoo_modules.py` need PyTorch; graphprune does not.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from zoo_modules import MODULES

TOKENS = 200
SMALL = {"vocab_size": TOKENS, "hidden_size": 64, "num_hidden_layers": 2}
HEADS = {**SMALL, "num_attention_heads": 4, "intermediate_size": 256}
PICTURES = {"image_size": 64, "num_labels": 10}
VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "patch_size": 16,
}
STAGES = {"hidden_sizes": [32, 48, 64, 96], "depths": [1, 1, 2, 1], "num_labels": 10}
ENCODER_DECODER = {
    "vocab_size": TOKENS,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "decoder_start_token_id": 2,
}


@dataclass(frozen=True)
class Network:
    """How to make a network, and its example inputs by the names its forward has for them."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]


class First(nn.Module):
    """The first output alone, of inputs in order; ``fixed`` are further arguments."""

    def __init__(self, model: nn.Module, names: Iterable[str], **fixed: Any) -> None:
        super().__init__()
        self.model, self.names, self.fixed = model, tuple(names), fixed

    def forward(self, *given: Tensor) -> Tensor:
        answer = self.model(**dict(zip(self.names, given, strict=True)), **self.fixed)
        return answer[0] if isinstance(answer, tuple) else next(iter(answer.values()))


def tokens(*names: str, length: int = 12) -> Callable[[], dict[str, Tensor]]:
    """Token ids, and for each further name a mask (or types) of ones of their shape."""

    def make() -> dict[str, Tensor]:
        made = {"input_ids": torch.randint(3, TOKENS, (2, length))}
        return made | {name: torch.ones(2, length, dtype=torch.int64) for name in names}

    return make


def pictures(side: int = 64) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(2, 3, side, side)}


def both(**shapes: tuple[int, ...]) -> Callable[[], dict[str, Tensor]]:
    """Floats of the given shapes; names that end in ids are tokens, in mask are ones."""

    def one(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("ids"):
            return torch.randint(3, TOKENS, shape)
        return torch.ones(shape, dtype=torch.int64) if name.endswith("mask") else torch.randn(shape)

    return lambda: {name: one(name, shape) for name, shape in shapes.items()}


def model(
    kind: str, config: str, *, attention: str | None = None, **options: Any
) -> Callable[[], nn.Module]:
    """A transformers model of random weights."""

    def make() -> nn.Module:
        made = getattr(hf, config)(**options)
        for flag in ("use_cache", "use_mamba_kernels"):
            if hasattr(made, flag):
                setattr(made, flag, False)
        if attention is not None:
            made._attn_implementation = attention
        return getattr(hf, kind)(made)

    return make


def entries() -> dict[str, Network]:
    """Name → network."""
    found: dict[str, Network] = {}

    def add(name: str, kind: str, inputs: Any, config: str = "", **options: Any) -> None:
        config = config or _config_of(kind)
        found[name] = Network(lambda: First(model(kind, config, **options)(), inputs()), inputs)

    def part(
        name: str, kind: str, inside: str, inputs: Any, fixed: Any = None, **options: Any
    ) -> None:
        make = model(kind, _config_of(kind), **options)
        found[name] = Network(
            lambda: First(make().get_submodule(inside), inputs(), **(fixed or {})), inputs
        )

    for attention in ("eager", "sdpa"):
        end = "" if attention == "eager" else "_sdpa"
        own = {"attention": attention}
        add(f"vit{end}", "ViTForImageClassification", pictures(), **VIT, **PICTURES, **own)
        add(f"bert{end}", "BertModel", tokens("attention_mask", "token_type_ids"), **HEADS, **own)
        gqa = {**HEADS, "num_key_value_heads": 2, **own}
        add(f"llama_gqa{end}", "LlamaForCausalLM", tokens("attention_mask"), **gqa)
        add(f"gpt2{end}", "GPT2LMHeadModel", tokens("attention_mask"), vocab_size=TOKENS, n_embd=64,
            n_layer=2, n_head=4, **own)  # fmt: skip
        part(f"whisper_encoder{end}", "WhisperModel", "encoder", both(input_features=(2, 80, 3000)),
             **ENCODER_DECODER, pad_token_id=0, **own)  # fmt: skip
    eager = {"attention": "eager"}
    add("deit", "DeiTForImageClassificationWithTeacher", pictures(), **VIT, **PICTURES)
    add("beit", "BeitForImageClassification", pictures(), **VIT, **PICTURES, attention="eager",
        use_relative_position_bias=True)  # fmt: skip
    add("dinov2", "Dinov2ForImageClassification", pictures(), **VIT, **PICTURES)
    add("dinov2_swiglu", "Dinov2ForImageClassification", pictures(), **VIT, **PICTURES,
        use_swiglu_ffn=True)  # fmt: skip
    add("yolos", "YolosForObjectDetection", pictures(), **{**VIT, "image_size": [64, 64]},
        num_detection_tokens=10)  # fmt: skip
    windows = {"image_size": 64, "patch_size": 2, "embed_dim": 32, "depths": [2, 2],
               "num_heads": [2, 4], "window_size": 8, "num_labels": 10}  # fmt: skip
    add("swin", "SwinForImageClassification", pictures(), **windows, attention="eager")
    add("swinv2", "Swinv2ForImageClassification", pictures(), **windows, attention="eager")
    add("convnext", "ConvNextForImageClassification", pictures(), **STAGES)
    add("convnextv2", "ConvNextV2ForImageClassification", pictures(), **STAGES)
    add("regnet_x", "RegNetForImageClassification", pictures(), **STAGES, embedding_size=32,
        groups_width=16, layer_type="x")  # fmt: skip
    add("regnet_y", "RegNetForImageClassification", pictures(), **STAGES, embedding_size=32,
        groups_width=16, layer_type="y")  # fmt: skip
    add("resnet", "ResNetForImageClassification", pictures(), **STAGES, embedding_size=32)
    add("mobilenet_v1", "MobileNetV1ForImageClassification", pictures(), depth_multiplier=0.25,
        **PICTURES)  # fmt: skip
    add("mobilenet_v2", "MobileNetV2ForImageClassification", pictures(), depth_multiplier=0.35,
        **PICTURES)  # fmt: skip
    add("efficientnet", "EfficientNetForImageClassification", pictures(), width_coefficient=0.5,
        depth_coefficient=0.3, hidden_dim=640, **PICTURES)  # fmt: skip
    add("mobilevit", "MobileViTForImageClassification", pictures(), **PICTURES,
        hidden_sizes=[48, 64, 80], neck_hidden_sizes=[16, 32, 48, 64, 80, 96, 128])  # fmt: skip
    add("segformer", "SegformerForSemanticSegmentation", pictures(), hidden_sizes=[32, 64, 64, 64],
        depths=[1, 1, 1, 1], decoder_hidden_size=64)  # fmt: skip
    add("poolformer", "PoolFormerForImageClassification", pictures(), **STAGES)
    add("levit", "LevitForImageClassification", pictures(), image_size=64, num_labels=10,
        hidden_sizes=[64, 96, 128], num_attention_heads=[2, 3, 4], depths=[1, 1, 1],
        key_dim=[16, 16, 16])  # fmt: skip
    add("focalnet", "FocalNetForImageClassification", pictures(), **PICTURES, embed_dim=32,
        depths=[1, 1, 1, 1])  # fmt: skip
    add("dpt", "DPTForDepthEstimation", pictures(), **{**VIT, "num_hidden_layers": 4},
        image_size=64, fusion_hidden_size=32,
        neck_hidden_sizes=[32, 32, 64, 64], backbone_out_indices=[0, 1, 2, 3])  # fmt: skip
    add("swin2sr", "Swin2SRForImageSuperResolution", pictures(32), image_size=32, embed_dim=32,
        depths=[2], num_heads=[2], window_size=8)  # fmt: skip
    causal = tokens("attention_mask")
    add("llama_mqa", "LlamaForCausalLM", causal, **HEADS, num_key_value_heads=1, **eager)
    add("llama_no_mask", "LlamaForCausalLM", tokens(), **HEADS, num_key_value_heads=2, **eager)
    add("mistral", "MistralForCausalLM", causal, **HEADS, num_key_value_heads=2, sliding_window=8,
        **eager)  # fmt: skip
    add("qwen2", "Qwen2ForCausalLM", causal, **HEADS, num_key_value_heads=2, **eager)
    add("qwen3", "Qwen3ForCausalLM", causal, **HEADS, num_key_value_heads=2, head_dim=16, **eager)
    add("gemma", "GemmaForCausalLM", causal, **HEADS, num_key_value_heads=1, head_dim=16, **eager)
    add("phi", "PhiForCausalLM", causal, **HEADS, **eager)
    add("phi3", "Phi3ForCausalLM", causal, **HEADS, num_key_value_heads=2, pad_token_id=0, **eager)
    add("gpt_neox", "GPTNeoXForCausalLM", causal, **HEADS, **eager)
    add("gptj", "GPTJForCausalLM", causal, vocab_size=TOKENS, n_embd=64, n_layer=2, n_head=4,
        rotary_dim=8, **eager)  # fmt: skip
    add("gpt_bigcode", "GPTBigCodeForCausalLM", causal, vocab_size=TOKENS, n_embd=64, n_layer=2,
        n_head=4, **eager)  # fmt: skip
    add("falcon", "FalconForCausalLM", causal, **SMALL, num_attention_heads=4, **eager)
    add("mixtral", "MixtralForCausalLM", causal, **HEADS, num_key_value_heads=2,
        num_local_experts=4, **eager)  # fmt: skip
    add("opt", "OPTForCausalLM", causal, **SMALL, ffn_dim=256, num_attention_heads=4,
        word_embed_proj_dim=64, **eager)  # fmt: skip
    add("bloom", "BloomForCausalLM", causal, **SMALL, n_head=4, **eager)
    add("mamba", "MambaForCausalLM", tokens(), **SMALL)
    t5 = {"vocab_size": TOKENS, "d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2,
          "num_heads": 4, "decoder_start_token_id": 0, **eager}  # fmt: skip
    gated = {**t5, "feed_forward_proj": "gated-gelu"}
    crossed = both(input_ids=(2, 7), encoder_hidden_states=(2, 12, 64))
    for name, options in (("t5", t5), ("t5_gated", gated)):
        add(f"{name}_encoder", "T5EncoderModel", causal, config="T5Config", **options)
        part(f"{name}_decoder", "T5Model", "decoder", crossed, {"use_cache": False}, **options)
    pairs = both(input_ids=(2, 12), decoder_input_ids=(2, 7))
    add("bart", "BartModel", pairs, **ENCODER_DECODER, **eager)
    add("marian", "MarianMTModel", pairs, **ENCODER_DECODER, pad_token_id=0, **eager)
    part("whisper_decoder", "WhisperModel", "decoder", crossed, {"use_cache": False},
         **ENCODER_DECODER, pad_token_id=0, **eager)  # fmt: skip
    clip = {key: VIT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    add("clip_text", "CLIPTextModelWithProjection", tokens(), config="CLIPTextConfig", **HEADS,
        projection_dim=32, eos_token_id=2)  # fmt: skip
    add("clip_vision", "CLIPVisionModelWithProjection", pictures(), config="CLIPVisionConfig",
        **VIT, image_size=64, projection_dim=32)  # fmt: skip
    add("siglip_vision", "SiglipVisionModel", pictures(), config="SiglipVisionConfig", **clip,
        intermediate_size=256, image_size=64, patch_size=16)  # fmt: skip
    masked = tokens("attention_mask")
    add("distilbert", "DistilBertModel", masked, vocab_size=TOKENS, dim=64, hidden_dim=256,
        n_layers=2, n_heads=4, **eager)  # fmt: skip
    add("roberta", "RobertaForMaskedLM", masked, **HEADS, **eager)
    add("albert", "AlbertModel", masked, **HEADS, embedding_size=32, **eager)
    add("electra", "ElectraModel", masked, **HEADS, embedding_size=32, **eager)
    add("mpnet", "MPNetModel", masked, **HEADS)
    add(
        "deberta",
        "DebertaModel",
        masked,
        **HEADS,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    )
    add("deberta_v2", "DebertaV2Model", masked, **HEADS, relative_attention=True,
        pos_att_type=["c2p", "p2c"], position_buckets=8, norm_rel_ebd="layer_norm",
        share_att_key=True, conv_kernel_size=3)  # fmt: skip
    add("squeezebert", "SqueezeBertModel", masked, **HEADS, embedding_size=64)
    add("mobilebert", "MobileBertModel", masked, vocab_size=TOKENS, hidden_size=64,
        num_hidden_layers=2, intermediate_size=128, true_hidden_size=32, embedding_size=32,
        intra_bottleneck_size=32)  # fmt: skip
    add("convbert", "ConvBertModel", masked, **HEADS, embedding_size=64)
    add("funnel", "FunnelBaseModel", masked, config="FunnelConfig", vocab_size=TOKENS, d_model=64,
        n_head=4, d_head=16, d_inner=256, block_sizes=[1, 1])  # fmt: skip
    add("xlnet", "XLNetModel", masked, vocab_size=TOKENS, d_model=64, n_layer=2, n_head=4,
        d_inner=256)  # fmt: skip
    add(
        "fnet",
        "FNetModel",
        tokens(),
        **SMALL,
        intermediate_size=256,
        use_tpu_fourier_optimizations=False,
    )
    speech = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
              "intermediate_size": 256, "conv_dim": [32, 32, 32], "conv_kernel": [10, 3, 3],
              "conv_stride": [5, 2, 2], "num_conv_pos_embeddings": 16,
              "num_conv_pos_embedding_groups": 4}  # fmt: skip
    sound = both(input_values=(2, 1600))
    add("wav2vec2", "Wav2Vec2Model", sound, **speech, **eager)
    add("wav2vec2_stable", "Wav2Vec2Model", sound, **speech, do_stable_layer_norm=True,
        feat_extract_norm="layer", **eager)  # fmt: skip
    add("hubert", "HubertModel", sound, **speech, **eager)
    add("detr", "DetrForObjectDetection", pictures(), use_pretrained_backbone=False,
        use_timm_backbone=False, backbone=None, num_queries=10, num_labels=10,
        backbone_config=hf.ResNetConfig(**STAGES, embedding_size=32, out_features=["stage4"]),
        **{key: v for key, v in ENCODER_DECODER.items() if "_id" not in key and "size" not in key},
        **eager)  # fmt: skip
    for name, (make, shape) in MODULES.items():
        found[name] = Network(make, both(input_ids=shape) if name == "swiglu" else both(x=shape))
    return found


def _config_of(kind: str) -> str:
    return getattr(hf, kind).config_class.__name__


def export(name: str, network: Network, out: Path) -> None:
    """Write the exports of one network; say what an exporter refuses."""
    torch.manual_seed(0)
    try:
        made, inputs = network.make().eval(), network.inputs()
        with torch.no_grad():
            made(*inputs.values())
    except Exception as error:  # whatever the library raises, the other networks go on
        return print(f"{name}: not made: {_said(error)}", flush=True)
    axes = {key: _open_axes(value) for key, value in inputs.items()}
    shared = {"input_names": list(inputs), "output_names": ["y"]}
    script = {"dynamo": False, "opset_version": 17}
    new = {"dynamo": True, "external_data": False, "verbose": False}
    open_axes = tuple(dict.fromkeys(value, torch.export.Dim.AUTO) for value in axes.values())
    shapes = {"given": open_axes} if isinstance(made, First) else open_axes
    attempts = (
        ("script", {**script, "dynamic_axes": axes}),
        ("dynamo", new),
        ("dynamic", {**new, "dynamic_shapes": shapes}),
    )
    for end, options in attempts:
        path = out / f"{name}.{end}.onnx"
        try:
            torch.onnx.export(made, tuple(inputs.values()), str(path), **shared, **options)
        except Exception as error:
            path.unlink(missing_ok=True)
            print(f"{path.name}: {_said(error)}", flush=True)


def _open_axes(value: Tensor) -> dict[int, str]:
    """The batch, and of tokens their number."""
    ids = value.dtype == torch.int64
    return {0: "batch", 1: f"tokens_{value.shape[1]}"} if ids else {0: "batch"}


def _said(error: BaseException) -> str:
    """The cause's first line: torch wraps what went wrong in instructions."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text[:160]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", help="only these networks")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for name, network in entries().items():
        if not given.names or name in given.names:
            export(name, network, given.out)


if __name__ == "__main__":
    main()
