"""What other libraries call an argument, and what it is called here."""

from __future__ import annotations

# torchvision's and transformers'
VIT_NAMES = {
    "image_size": "img_size",
    "in_channels": "in_chans",
    "num_channels": "in_chans",
    "num_labels": "num_classes",
    "hidden_dim": "embed_dim",
    "hidden_size": "embed_dim",
    "dim": "embed_dim",
    "num_layers": "depth",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "mlp_dim": "mlp_ratio (over embed_dim)",
    "intermediate_size": "mlp_ratio (over embed_dim)",
    "hidden_act": "act",
    "act_layer": "act",
    "mlp_layer": 'act ("swiglu")',
    "use_swiglu_ffn": 'act ("swiglu")',
    "vision_use_head": 'global_pool ("map")',
    "layer_norm_eps": "norm_eps",
    "layerscale_value": "init_values",
    "num_register_tokens": "reg_tokens",
    "dropout": "proj_drop_rate (and pos_drop_rate)",
    "hidden_dropout_prob": "proj_drop_rate (and pos_drop_rate)",
    "attention_dropout": "attn_drop_rate",
    "attention_probs_dropout_prob": "attn_drop_rate",
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
    "depths": "layers",
    "zero_init_last": "zero_init_residual",
    "output_stride": "none: the stride is always 32",
    "replace_stride_with_dilation": "none: the stride is always 32",
}
