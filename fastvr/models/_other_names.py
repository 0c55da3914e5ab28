"""What other libraries call an argument, and what it is called here; and what there is not here, and why."""

from __future__ import annotations

_WEIGHTS = "weights come with load_model(path) or create_model(name, pretrained=True)"

# torchvision's, transformers' and those of the ViTs that tutorials print
VIT_NAMES = {
    "image_size": "img_size",
    "in_channels": "in_chans",
    "num_channels": "in_chans",
    "channels": "in_chans",
    "num_labels": "num_classes",
    "hidden_dim": "embed_dim",
    "hidden_size": "embed_dim",
    "d_model": "embed_dim",
    "dim": "embed_dim",
    "num_layers": "depth",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "nhead": "num_heads",
    "heads": "num_heads",
    "mlp_dim": "mlp_ratio (over embed_dim)",
    "dim_feedforward": "mlp_ratio (over embed_dim)",
    "intermediate_size": "mlp_ratio (over embed_dim)",
    "activation": "act",
    "hidden_act": "act",
    "act_layer": "act",
    "mlp_layer": 'act ("swiglu")',
    "use_swiglu_ffn": 'act ("swiglu")',
    "vision_use_head": 'global_pool ("map")',
    "layer_norm_eps": "norm_eps",
    "norm_layer": "norm_eps (of LayerNorm, the only norm)",
    "layerscale_value": "init_values",
    "layer_scale_init_value": "init_values",
    "num_register_tokens": "reg_tokens",
    "pool": "global_pool",
    "dropout": "proj_drop_rate (and pos_drop_rate)",
    "hidden_dropout_prob": "proj_drop_rate (and pos_drop_rate)",
    "emb_dropout": "pos_drop_rate",
    "attention_dropout": "attn_drop_rate",
    "attention_probs_dropout_prob": "attn_drop_rate",
    "drop_path": "drop_path_rate",
    "stochastic_depth_prob": "drop_path_rate",
}

VIT_ABSENT = {
    "representation_size": "nothing lies between the last norm and the head",
    "conv_stem_configs": "patches are embedded by one convolution",
    "dim_head": "heads share embed_dim, embed_dim / num_heads for each",
    "distilled": "create_model makes DeiT's distilled models by their names",
    "weights": _WEIGHTS,
    "pretrained": _WEIGHTS,
    "checkpoint_path": _WEIGHTS,
}

# timm's and transformers'
RESNET_NAMES = {
    "in_channels": "in_chans",
    "num_channels": "in_chans",
    "num_labels": "num_classes",
    "cardinality": "groups",
    "base_width": "width_per_group",
    "stem_type": "stem_width (None: one 7x7 convolution)",
    "embedding_size": "width",
    "hidden_sizes": "width (and block)",
    "layer_type": "block",
    "depths": "layers",
    "zero_init_last": "zero_init_residual",
}

RESNET_ABSENT = {
    "output_stride": "the stride is always 32",
    "replace_stride_with_dilation": "the stride is always 32",
    "norm_layer": "every norm is BatchNorm",
    "act_layer": "every activation is ReLU",
    "hidden_act": "every activation is ReLU",
    "img_size": "images may have any size",
    "image_size": "images may have any size",
    "weights": _WEIGHTS,
    "pretrained": _WEIGHTS,
    "checkpoint_path": _WEIGHTS,
}
