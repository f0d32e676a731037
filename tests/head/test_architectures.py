"""patch_head against the model's own logits, over transformers' language models as random configurations: equal, or refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vcpo_kernels as vk

pytest.importorskip("transformers", reason="patch_head is for Hugging Face models: pip install transformers")
import transformers
from transformers.models.auto import modeling_auto

V = 97
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, **IDS,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": V, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, **IDS,
    "decoder_start_token_id": 1,
}  # fmt: skip
T5 = {
    "vocab_size": V,
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 1,
    "num_heads": 4,
    **IDS,
    "dropout_rate": 0.0,
}
RECURRENT = {**DECODER, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16, "head_dim": 8}
XLSTM = {"vocab_size": V, "hidden_size": 32, "num_blocks": 1, "num_heads": 2, **IDS, "output_logit_soft_cap": 3.0}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
PALIGEMMA = {
    "text_config": {"model_type": "gemma2", **DECODER, "head_dim": 8, "final_logit_softcapping": 3.0},
    "vision_config": {"model_type": "siglip_vision_model", **VISION}, "projection_dim": 32, "image_token_index": 95,
}  # fmt: skip
CHAMELEON = {
    **DECODER,
    "vocabulary_map": {"<image>": 90, "IMGIMGA": 91, "IMGIMGB": 92, **{f"t{i}": i for i in range(90)}},
    "vq_config": {
        "base_channels": 32, "embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "channel_multiplier": [1],
        "attn_resolutions": [], "num_res_blocks": 1, "resolution": 16,
    },
}  # fmt: skip

# One for each way of treating logits that transformers has; the class, its configuration, and what the output shows of it.
SHOWN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a bias beside the head: Bart": ("BartForConditionalGeneration", SEQ2SEQ, {}),
    "a bias beside the head: Marian": ("MarianMTModel", SEQ2SEQ, {}),
    "a bias beside the head: Pegasus": ("PegasusForConditionalGeneration", SEQ2SEQ, {}),
    "a bias beside the head: LED": (
        "LEDForConditionalGeneration", {**SEQ2SEQ, "attention_window": 4, "max_encoder_position_embeddings": 64}, {},
    ),
    "hidden scaled before the head: T5": ("T5ForConditionalGeneration", T5, {}),
    "padding cut off: Inkling": ("InklingForCausalLM", {**DECODER, "unpadded_vocab_size": 90}, {"vocabulary": 90}),
    "softcap: Gemma-2": (
        "Gemma2ForCausalLM", {**DECODER, "head_dim": 8, "final_logit_softcapping": 3.0}, {"softcap": 3.0},
    ),
    "softcap by another name: RecurrentGemma": (
        "RecurrentGemmaForCausalLM", {**RECURRENT, "logits_soft_cap": 3.0}, {"softcap": 3.0},
    ),
    "softcap by a third name: xLSTM": ("xLSTMForCausalLM", XLSTM, {"softcap": 3.0}),
    "softcap in a text_config: PaliGemma": ("PaliGemmaForConditionalGeneration", PALIGEMMA, {"softcap": 3.0}),
    "multiplied: Cohere": ("CohereForCausalLM", {**DECODER, "logit_scale": 0.25}, {"scale": 0.25}),
    "multiplied: HyperCLOVA X": ("HyperCLOVAXForCausalLM", {**DECODER, "logits_scaling": 4.0}, {"scale": 4.0}),
    "divided: Granite": ("GraniteForCausalLM", {**DECODER, "logits_scaling": 4.0}, {"scale": 0.25}),
    "a head in float32: Nemotron": ("NemotronForCausalLM", DECODER, {}),
    "several streams: ProphetNet": (
        "ProphetNetForConditionalGeneration",
        {"vocab_size": V, "hidden_size": 32, "num_encoder_layers": 1, "num_decoder_layers": 1, "encoder_ffn_dim": 48,
         "decoder_ffn_dim": 48, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, **IDS},
        {},
    ),
}  # fmt: skip


def built(name: str, sizes: dict[str, Any]) -> nn.Module:
    model_class = getattr(transformers, name, None)
    if model_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    config = model_class.config_class(**sizes)
    config._attn_implementation = "eager"
    model: nn.Module = model_class(config)
    head = model.get_output_embeddings()
    with torch.no_grad():
        if isinstance(head, nn.Linear):
            for p in head.parameters():
                p.normal_(std=0.3)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("final_logits_bias"):
                buffer.normal_()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "activation_dropout", "attention_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model


def arguments(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    out: dict[str, Any] = {"input_ids": ids, "return_dict": True, "use_cache": False}
    parameters = inspect.signature(type(model).forward).parameters
    if getattr(model.config, "is_encoder_decoder", False):
        out["decoder_input_ids"] = ids
    if "token_type_ids" in parameters and hasattr(model.config, "vision_config"):
        out |= {"token_type_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids)}
    return out


def compared(model: nn.Module) -> vk.HeadOutput:
    """In training and in evaluation; the same random numbers for both forwards."""
    for training in (False, True):
        model.train(training)
        ids = torch.randint(3, 60, (2, 64 if "xLSTM" in type(model).__name__ else 7))
        torch.manual_seed(1)
        logits = model(**arguments(model, ids)).logits
        want = vk.token_stats(logits.float().contiguous(), ids)
        torch.manual_seed(1)
        with vk.patch_head(model):
            out = model(**arguments(model, ids))
        got = out.token_stats(ids, shift=False)
        assert isinstance(out, vk.HeadOutput)
        torch.testing.assert_close(got.logp, want.logp, atol=2e-4, rtol=2e-5)
        torch.testing.assert_close(got.lse, want.lse, atol=2e-4, rtol=2e-5)
        assert float(logits.detach().float().std()) > 0.05, "flat logits would prove nothing"
    return out


@pytest.mark.parametrize("name", SHOWN)
def test_treatments(name: str) -> None:
    class_name, sizes, shown = SHOWN[name]
    out = compared(built(class_name, sizes))
    found = {"vocabulary": len(out.weight), "softcap": out.softcap, "scale": out.scale}
    assert found == {"vocabulary": V, "softcap": None, "scale": 1.0} | shown


def test_refused_in_the_first_forward() -> None:
    """Chameleon masks single entries of its vocabulary."""
    model = built("ChameleonForConditionalGeneration", CHAMELEON)
    with (
        vk.patch_head(model),
        pytest.raises(
            RuntimeError, match=r"ChameleonForConditionalGeneration applies __setitem__ to its logits.*token_stats"
        ),
    ):
        model(**arguments(model, torch.randint(3, 60, (2, 7))))


# --- every class, as far as it comes to life from these numbers ------------------------------------------------------

SIZES = {
    **DECODER, **SEQ2SEQ, **T5, "head_dim": 8, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "ffn_dim": 48,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "embedding_size": 32, "n_group": 1, "topk_group": 1, "final_logit_softcapping": 3.0, "logit_scale": 0.25,
    "logits_scaling": 4.0, "is_decoder": True,
}  # fmt: skip
TABLES = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES")
CLASSES = sorted({
    name for table in TABLES for names in getattr(modeling_auto, table, {}).values()
    for name in ([names] if isinstance(names, str) else names)
})  # fmt: skip


def small(name: str) -> nn.Module:
    model_class = getattr(transformers, name, None)
    if model_class is None:
        pytest.skip("not in this transformers")
    if getattr(model_class.config_class, "sub_configs", None):
        pytest.skip("its sizes are those of several models")
    known = inspect.signature(model_class.config_class.__init__).parameters
    fields = {**known, **vars(model_class.config_class), **getattr(model_class.config_class, "attribute_map", {})}
    sizes = {key: value for key, value in SIZES.items() if key in fields}
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(model_class.config_class(**sizes)).parameters())
    if count > 30_000_000:
        pytest.skip(f"{count / 1e6:.0f} million parameters with these sizes")
    return built(name, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_every_class(name: str) -> None:
    """Equal, or an error of this package's words. What does not run from these sizes by itself is left out."""
    try:
        model = small(name)
        ids = torch.randint(3, 60, (2, 7))
        outputs = []
        for _ in range(2):
            torch.manual_seed(1)
            outputs.append(model.train()(**arguments(model, ids)).logits)
    except Exception as error:
        pytest.skip(f"no such model from these sizes: {type(error).__name__}")
    if not torch.equal(*outputs) or outputs[0].shape != (*ids.shape, V):
        pytest.skip("draws random numbers of its own, or has other logits than one row for each id")
    try:
        compared(model)
    except (TypeError, RuntimeError) as error:
        if not str(error).startswith("patch_head: "):
            raise
