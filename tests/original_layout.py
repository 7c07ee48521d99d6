"""Writes pipelines as single files in the layout of the original Stable Diffusion code."""

import re

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def replaced(name, table):
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def unet(module):
    """The blocks are numbered through: a layer each, then the one that changes the resolution."""
    layers, found = module.config.layers_per_block, {}
    for name, tensor in module.state_dict().items():
        parts = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
        if parts:
            way, block, kind, layer, rest = parts.groups()
            block, layer = int(block), int(layer)
            prefix, first = ("input", 1) if way == "down" else ("output", 0)
            number = first + block * (layers + 1) + layer
            if kind == "resnets":
                new = f"{prefix}_blocks.{number}.0.{replaced(rest, RESNET)}"
            elif kind == "attentions":
                new = f"{prefix}_blocks.{number}.1.{rest}"
            elif kind == "downsamplers":
                new = f"input_blocks.{number + layers}.0.{rest.replace('conv', 'op')}"
            else:
                has_attention = hasattr(module.up_blocks[block], "attentions")
                new = f"output_blocks.{number + layers}.{1 + has_attention}.{rest}"
        elif parts := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
            kind, layer, rest = parts.groups()
            number = 1 if kind == "attentions" else 2 * int(layer)
            rest = rest if kind == "attentions" else replaced(rest, RESNET)
            new = f"middle_block.{number}.{rest}"
        else:
            new = replaced(name, ENDS)
        found[f"model.diffusion_model.{new}"] = tensor
    return found


def vae(module):
    last, found = len(module.config.block_out_channels) - 1, {}
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    for name, tensor in module.state_dict().items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(
            r"up_blocks\.(\d+)\.(resnets|upsamplers\.0)",
            lambda m: f"up.{last - int(m[1])}.{'block' if m[2] == 'resnets' else 'upsample'}",
            new,
        )
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        if "mid_block.attentions.0" in new:
            new = replaced(new.replace("mid_block.attentions.0", "mid.attn_1"), attention)
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        new = replaced(new, {"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"})
        found[f"first_stage_model.{new}"] = tensor
    return found


def clip(module, prefix):
    found = {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}
    positions = module.text_model.embeddings.position_ids  # old versions of transformers saved it
    return found | {f"{prefix}text_model.embeddings.position_ids": positions}


def open_clip(module, prefix):
    import torch

    found, state = {}, module.state_dict()
    for name, tensor in state.items():
        parts = re.match(r"text_model\.encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
        if parts and re.search("[qkv]_proj", name):
            if "q_proj" in name:
                joined = [state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
                new = f"transformer.resblocks.{parts[1]}.attn.in_proj_{parts[3]}"
                found[prefix + new] = torch.cat(joined)
            continue
        if parts:
            new = f"transformer.resblocks.{parts[1]}.{replaced(parts[2], OPEN_CLIP)}.{parts[3]}"
        else:
            new = {
                "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
                "text_model.embeddings.position_embedding.weight": "positional_embedding",
                "text_model.final_layer_norm.weight": "ln_final.weight",
                "text_model.final_layer_norm.bias": "ln_final.bias",
                "text_projection.weight": "text_projection",
            }[name]
        found[prefix + new] = tensor.T if new == "text_projection" else tensor
    return found


def single_file(pipeline, is_open=False):
    """The tensors of a pipeline by their original names; `is_open` for SD 2.x's text encoder."""
    found = unet(pipeline.unet) | vae(pipeline.vae)
    if hasattr(pipeline, "text_encoder_2"):
        found |= clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        found |= open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    elif is_open:
        found |= open_clip(pipeline.text_encoder, "cond_stage_model.model.")
    else:
        found |= clip(pipeline.text_encoder, "cond_stage_model.transformer.")
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}
