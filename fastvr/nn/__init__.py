"""Modules: parameters, names (timm's and torchvision's) and train/eval state; ops compute."""
