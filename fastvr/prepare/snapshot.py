"""A model's copy for inference, with what can be prepared of its weights prepared."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastvr.models._model import Model
from fastvr.models.features import Backbone
from fastvr.models.resnet import ResNet
from fastvr.nn.conv_bn_relu import ScaleShift
from fastvr.nn.plain import has_hooks


def snapshot_of(model: Model | Backbone) -> Model | Backbone:
    """``model`` copied, without gradients, BatchNorms as the scale and shift that they come to.

    Raises:
        ValueError: a module is in training mode or has hooks.
    """
    for name, module in model.named_modules():
        where = f"model.{name}" if name else "model"
        if module.training:
            raise ValueError(f"prepare: {where} must be in eval mode; got training mode: call model.eval()")
        if has_hooks(module):
            raise ValueError(f"prepare: {where} must have no hooks, since a CUDA graph would not call them")
    snapshot = copy.deepcopy(model).requires_grad_(False)
    inner = model.model if isinstance(model, Backbone) else model
    layout = torch.channels_last if isinstance(inner, ResNet) else torch.contiguous_format
    snapshot.to(memory_format=layout)
    for parent in list(snapshot.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d and child.running_mean is not None:
                setattr(parent, name, ScaleShift(child).eval())
    return snapshot
